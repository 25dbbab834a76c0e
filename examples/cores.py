"""Import this before PyTorch: its threads then sleep while they wait for each other, instead of spinning.

On an idle machine that costs little; on one whose cores are shared, small operators run many times faster.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
