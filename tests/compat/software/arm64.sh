#!/bin/sh
# A Python with numpy and onnxruntime for 64-bit Arm in the folder named, from this machine's own Debian and pip sources.
# Nothing is installed on this machine; qemu-aarch64 (qemu-user) runs it. Needs apt-get, dpkg and a pip.
set -eu
folder=$1
pip=$2
mkdir -p "$folder/apt/state/lists/partial" "$folder/apt/cache/archives/partial"
: > "$folder/apt/status"
arm() {
    tool=$1
    shift
    "$tool" -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root \
        -o Dir::State="$folder/apt/state" -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt/cache" "$@"
}
arm apt-get update || true # of sources that have nothing for Arm
python=$(arm apt-cache show python3-minimal | sed -n -E 's/^(Pre-)?Depends:.*python(3\.[0-9]+)-minimal.*/\2/p' | head -n 1)
arm apt-get install --yes --download-only --no-install-recommends "python$python-minimal" "libpython$python-stdlib" libstdc++6
for package in "$folder"/apt/cache/archives/*.deb; do
    dpkg -x "$package" "$folder"
done
[ -e "$folder/lib" ] || ln -s usr/lib "$folder/lib"
# Later releases of onnxruntime crash in the emulator of Debian 12, qemu 7.2.
$pip download --quiet --no-deps --only-binary :all: --python-version "$python" --platform manylinux2014_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 --dest "$folder/wheels" numpy==2.2.6 onnxruntime==1.23.2
for wheel in "$folder"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$folder/site"
done
ln -sf "python$python" "$folder/usr/bin/python3"
rm -rf "$folder/apt" "$folder/wheels"
