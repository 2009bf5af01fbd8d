"""Fine-tune Flax models with circulant and diagonal adapters: CDVFT, C3A and BCA."""

from circflax import interop as interop
from circflax import linen as linen
from circflax import methods as methods
from circflax import ops as ops
from circflax import tree as tree
from circflax.methods import BCA as BCA
from circflax.methods import C3A as C3A
from circflax.methods import CDVFT as CDVFT
from circflax.methods import LoRA as LoRA
from circflax.methods import Method as Method
from circflax.methods import make_method as make_method
from circflax.tree import AdapterConfig as AdapterConfig
from circflax.tree import Plan as Plan
from circflax.tree import combine as combine
from circflax.tree import init_adapters as init_adapters
from circflax.tree import load_adapters as load_adapters
from circflax.tree import make_plan as make_plan
from circflax.tree import merge as merge
from circflax.tree import report_adapters as report_adapters
from circflax.tree import save_adapters as save_adapters
from circflax.tree import summarize as summarize
from circflax.tree import switch_off as switch_off
from circflax.tree import unmerge as unmerge
