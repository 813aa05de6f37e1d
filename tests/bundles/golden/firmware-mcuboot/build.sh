#!/bin/sh
# Compiles the self-test: `sh build.sh host FOLDER` for this computer, `sh build.sh firmware FOLDER` for the microcontroller.
# FOLDER then holds selftest, or selftest.elf and selftest.bin: what is signed for the bootloader. Two runs give the same bytes.
set -eu
CPU='cortex-m3'
mkdir -p "$2"
OUT=$(cd "$2" && pwd)
cd "$(dirname "$0")/src"
# Never a fused multiply-add: the microcontroller computes what the host does.
set -- "$1" -std=c99 -O2 -ffp-contract=off -Wall -Wextra -Werror -isystem emlearn -ffunction-sections -fdata-sections -Wl,--gc-sections
case $1 in
  host)
    shift
    "${CC:-gcc}" "$@" selftest.c model.c board_host.c -o "$OUT/selftest" -lm
    ;;
  firmware)
    shift
    "${CROSS:-arm-none-eabi-}gcc" -mcpu="$CPU" -mthumb -mfloat-abi=soft -nostartfiles "$@" -Wl,--build-id=none -T firmware.ld \
      startup.c selftest.c model.c board_semihosting.c -o "$OUT/selftest.elf" -lm
    "${CROSS:-arm-none-eabi-}objcopy" -O binary "$OUT/selftest.elf" "$OUT/selftest.bin"
    ;;
  *)
    echo "usage: sh build.sh host|firmware FOLDER" >&2
    exit 3
    ;;
esac
