// All kernels for the GPU: nvcc makes kernels.fatbin of this file (scripts/kernels.py).
#include "kernels.h"
