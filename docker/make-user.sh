#!/bin/sh
# Make the user `vllm` (2000, group 0) below a folder, if it is not there: make-user.sh /
# vLLM's own image has the same user. Its home can be written by group 0, so that any `docker run --user UID:0` works.
set -eu
root=${1%/}
grep -q '^vllm:' "$root/etc/passwd" || echo 'vllm:x:2000:0:vLLM:/home/vllm:/bin/sh' >>"$root/etc/passwd"
mkdir -p "$root/home/vllm/.cache"
chmod -R g+rwX "$root/home/vllm"
