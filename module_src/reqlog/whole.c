// SPDX-License-Identifier: GPL-2.0-only
/*
 * All of reqlog as one translation unit: the kernel's headers are read once and not
 * once per file, which halves the time of a DKMS build on the host. Each file
 * still compiles alone, and no two may use one static name.
 */
#include "reqlog/attach.c"
#include "reqlog/bio.c"
#include "reqlog/control.c"
#include "reqlog/identity.c"
#include "reqlog/main.c"
#include "reqlog/overflow.c"
#include "reqlog/probe.c"
