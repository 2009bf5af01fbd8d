"""The methods that this application adds to those of circflax."""

import circflax as cf

HEAD_ALONE, BITFIT, FULL = "none", "bitfit", "full"
# LaMDA with ranks by the layers' spectra.
LAMDA_PP = "lamda++"
# Those that train leaves of the base at the learning rate that adapters would have.
IN_PLACE = (BITFIT, FULL)
# The learning rate of each to begin with; those of circflax have their own.
RATES = {FULL: 5e-5, BITFIT: 1e-3, HEAD_ALONE: 0.0, LAMDA_PP: cf.LaMDA.learning_rate}
# Every name that a run can be given.
ALL = (*cf.methods.METHODS, *RATES)
