#!/bin/sh
# Entry point of the images: serve.sh MODEL [flags of `vllm serve`]
# The server listens on $PORT, 8000 if that is unset; healthcheck.py asks there.
set -eu
case "${1-}" in
--help*) ;;
'' | -*)
    echo "xquant: no model was given first; say: docker run [options] IMAGE MODEL [flags of vllm serve]" >&2
    exit 2
    ;;
esac
model=$1
shift
exec vllm serve "$model" --attention-backend xquant --port "${PORT:-8000}" "$@"
