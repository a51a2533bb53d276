"""What a file is, from names and shapes alone; and why another one is refused."""

import pickle
from pathlib import Path

import bdm
from bdm.formats.identify import describe_file

weights = "diffusion_pytorch_model.safetensors"
for path in (
    Path("assets/emoji"),
    Path("assets/emoji/branch") / weights,
    Path("assets/emoji/unet") / weights,
):
    print(path, *(f"  {name}: {value}" for name, value in describe_file(path).items()), sep="\n")

Path("harmful.ckpt").write_bytes(
    pickle.dumps(print, protocol=2)
)  # a pickle that names a function instead of weights
try:
    describe_file(Path("harmful.ckpt"))
except bdm.UserError as error:
    print("refused:", error)
