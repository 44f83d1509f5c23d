#pragma once

#pragma GCC visibility push(hidden)
namespace cuemu {
// From now on a fault in kernel code ends the launch with a message, not the process.
void catch_faults();
} // namespace cuemu
#pragma GCC visibility pop
