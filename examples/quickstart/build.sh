#!/bin/sh
# Builds the programs of this stack and puts them into ./bin. `./build.sh dev` builds faster and runs slower.
#
# A program is replaced by a rename, so that one that is running goes on with its old file.
set -eu
cd "$(dirname "$0")"
profile=${1:-release}
case $profile in
    release) folder=release ;;
    dev) folder=debug ;;
    *) echo "usage: $0 [release|dev]" >&2; exit 2 ;;
esac
cargo build --quiet --profile "$profile" --package orchestra-quickstart --bins
target=$(cargo metadata --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
mkdir -p bin
for program in agent-api worker migrate web; do
    cp "$target/$folder/$program" "bin/.$program.$$"
    mv "bin/.$program.$$" "bin/$program"
done
echo "built: $(pwd)/bin"
