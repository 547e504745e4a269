#!/usr/bin/env bash
# Pack everything that run.py needs on a GPU machine without a network into .kit/, and print the command to run there.
#
#     benchmarks/gpu/pack.sh DATA
#
# DATA: a folder with FashionMNIST/raw/ (four files, gzipped or not) and optionally faces/ (photographs and
# face_landmarks.csv) and camvid/ (train, val and test with images/ and masks/). See README.md.
#
# Environment:
#     PYTHON          a Python with pip (python3)
#     TARGET_PYTHON   the Python version of the GPU machine (3.12)
#     MAX_MIB         maximum size of .kit/ and the working tree together (64)
set -euo pipefail
[ $# = 1 ] && [ -d "$1" ] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$(cd "$1" && pwd)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$(git -C "$here" rev-parse --show-toplevel)"
pip=("${PYTHON:-python3}" -m pip --disable-pip-version-check)
"${pip[@]}" --version >/dev/null || { echo "pack.sh: ${PYTHON:-python3} has no pip; set PYTHON" >&2; exit 2; }

rm -rf .kit
mkdir -p .kit/wheels .kit/data/FashionMNIST/raw
cp benchmarks/gpu/*.py .kit/

# The project: tracked files of the working tree, including uncommitted changes.
git ls-files -z -- cnntrain conf tests pyproject.toml README.md LICENSE |
  while IFS= read -r -d '' file; do if [ -e "$file" ]; then printf '%s\0' "$file"; fi; done |
  tar --null -T - -czf .kit/project.tar.gz

# Wheels of dependencies that the GPU machine does not have.
version=${TARGET_PYTHON:-3.12}
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
"${pip[@]}" download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" -d .kit/wheels \
  'hydra-core>=1.3,<1.4' 'omegaconf>=2.3,<2.4' 'simplejpeg>=1.8' 'optuna>=5' alembic sqlalchemy colorlog mako greenlet
"${pip[@]}" wheel -q --no-deps -w .kit/wheels 'antlr4-python3-runtime==4.9.*' # published as source only

for file in train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte; do
  source=$data/FashionMNIST/raw/$file
  if [ -f "$source" ]; then gzip -9 -n -c "$source" >".kit/data/FashionMNIST/raw/$file.gz"
  else cp "$source.gz" .kit/data/FashionMNIST/raw/; fi
done
if [ -d "$data/faces" ]; then # the 24 smallest photographs and their rows
  mkdir -p .kit/data/faces
  find "$data/faces" -maxdepth 1 -name '*.jpg' -printf '%s %p\n' | sort -n | head -24 | cut -d' ' -f2- |
    while IFS= read -r photo; do cp "$photo" .kit/data/faces/; done
  head -1 "$data/faces/face_landmarks.csv" >.kit/data/faces/face_landmarks.csv
  for photo in .kit/data/faces/*.jpg; do
    grep -F "$(basename "$photo")," "$data/faces/face_landmarks.csv" >>.kit/data/faces/face_landmarks.csv || true
  done
fi
if [ -d "$data/camvid" ]; then # 16 evenly spaced scenes of each split, because neighboring ones may lack a class
  for split in train val test; do
    mkdir -p ".kit/data/camvid/$split/images" ".kit/data/camvid/$split/masks"
    scenes=$(find "$data/camvid/$split/images" -type f | sort)
    every=$(($(wc -l <<<"$scenes") / 16))
    awk -v every="$((every > 0 ? every : 1))" 'NR % every == 1 || every == 1' <<<"$scenes" | head -16 | while IFS= read -r image; do
      name=$(basename "$image")
      cp "$image" ".kit/data/camvid/$split/images/"
      cp "$data/camvid/$split/masks/${name%.*}.png" ".kit/data/camvid/$split/masks/"
    done
  done
fi

kit_mib=$(du -sm .kit | cut -f1)
tree_mib=$({ git ls-files -z -co --exclude-standard | xargs -0 du -cm --apparent-size 2>/dev/null || true; } | tail -1 | cut -f1)
echo ".kit/ contains $kit_mib MiB, the working tree about ${tree_mib:-?} MiB"
if [ $((kit_mib + ${tree_mib:-0})) -gt "${MAX_MIB:-64}" ]; then
  echo "pack.sh: together they exceed MAX_MIB=${MAX_MIB:-64}; remove data from .kit/data" >&2
  exit 1
fi
cat <<'COMMAND'
On the GPU machine, in the root of a copy of this tree with .kit/ ($OUT: a folder for the reports):

set -o pipefail; python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .kit/site .kit/wheels/*.whl && export PYTHONPATH=$PWD/.kit/site PYTHONUNBUFFERED=1 || exit; python3 .kit/run.py --device cuda --kit .kit --out "$OUT" --budget 500 2>&1 | tee "$OUT/log.txt"

To run selected items only, add `--only ITEM,ITEM`; `python3 .kit/run.py --list` lists them.
COMMAND
