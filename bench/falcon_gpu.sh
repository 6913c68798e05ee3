#!/bin/sh
# Falcon's figures on one GPU, end to end: folders of exact shapes with random weights, then
# `longwing bench` on them, each run's JSON in OUT.
#
#   sh bench/falcon_gpu.sh WORK TOKENIZER OUT [PART...]
#
# WORK: a folder with 45 GB of room, best in memory (tmpfs), where models are kept from part to part.
# TOKENIZER: a folder with Falcon's tokenizer.json or falcon_tokenizer.json.xz.
# Parts, all of them without any:
#   speed   Falcon-40B, 4 bits, groups of 128, cache in bfloat16: decoding, drafts, 24,000 tokens read
#           in one chunk
#   cap     the same weights under a hard limit of 24 GiB, 24,576 tokens and an answer
#   long    3 bits, groups of 128, under the same limit: 100,000 tokens and more
#   small   Falcon-7B, 4 bits, groups of 64
#   peers   transformers in bfloat16, both shapes
# Under the limit: symmetric groups of 128, embedding and head one tensor in bfloat16 (as Falcon has
# them), cache in 8 bits, prompts in chunks of 1,024: of 2,048, 24,576 tokens would not fit.
# LONGWING: the command to run, "python3 -m longwing" if unset.
set -eu
work=$1 tokenizer=$2 out=$3
shift 3
here=$(dirname "$0")
longwing=${LONGWING:-python3 -m longwing}
mkdir -p "$work" "$out"

folder() { # NAME SHAPE BITS GROUP: made once
    [ -d "$work/$1" ] && return
    python3 "$here/make_folder.py" "$2" "$work/$1" --bits "$3" --group-size "$4" \
        --tokenizer "$tokenizer"
}

measure() { # NAME FOLDER OPTION...
    name=$1 model=$2
    shift 2
    $longwing bench "$work/$model" "$@" --json >"$out/$name.json"
    python3 "$here/show.py" "$out/$name.json"
}

for part in ${*:-speed cap long small peers}; do
    case $part in
    speed)
        folder f40 falcon-40b 4 128
        measure falcon40b f40 --batch 1,16,32 --context 1k,24k --prompt 24000 --drafts 1,3,7,15 \
            --max-batch-tokens 24000 --only decode,drafts,prefill --tokens 16 --repeats 3 ;;
    cap)
        folder f40 falcon-40b 4 128
        measure falcon40b-24gib f40 --gpu-memory 24GiB --kv-dtype int8 --max-batch-tokens 1024 \
            --context 24k --prompt 24000 --only decode,prefill --tokens 16 --repeats 2 ;;
    long)
        folder f40-3 falcon-40b 3 128
        measure falcon40b-3bit-24gib f40-3 --gpu-memory 24GiB --kv-dtype int8 --max-batch-tokens 1024 \
            --context 1k,100000 --only decode --tokens 16 --repeats 3 ;;
    small)
        folder f7 falcon-7b 4 64
        measure falcon7b f7 --batch 1,16 --context 1k,24k --prompt 24000 --max-batch-tokens 24000 \
            --only decode,prefill --tokens 32 --repeats 3 ;;
    peers)
        python3 "$here/peers.py" falcon-7b falcon-40b --out "$out/peers.jsonl" ;;
    *)
        echo "no part is called $part" >&2
        exit 2 ;;
    esac
done
