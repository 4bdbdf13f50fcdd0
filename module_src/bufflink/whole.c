// SPDX-License-Identifier: GPL-2.0-only
/*
 * All of bufflink as one translation unit: the kernel's headers are read once and not
 * once per file, which halves the time of a DKMS build on the host. Each file
 * still compiles alone, and no two may use one static name.
 */
#include "bufflink/barrier.c"
#include "bufflink/batch.c"
#include "bufflink/channel.c"
#include "bufflink/chardev.c"
#include "bufflink/main.c"
#include "bufflink/ring.c"
