#!/bin/sh
# Install Debian packages for good, without what apt keeps for later: system-packages.sh PACKAGE...
# Versions are those of the base image's release, which keeps only the newest of each: the base image is what is pinned.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet
apt-get install --quiet --yes --no-install-recommends "$@"
apt-get clean
# Where apt itself says that its lists are.
eval "$(apt-config shell LISTS Dir::State::Lists/d)"
rm -rf "${LISTS:?}"*
