// All kernels for the CPU: g++ makes a shared object of this file for the tests.
#include "kernels.h"
