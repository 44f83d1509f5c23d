// Flags that a gradient scaler sets on the device.
#pragma once

// Whether some gradient of the step was not finite; null: none.
__device__ __forceinline__ bool is_set(const float* flag) { return flag && *flag != 0.0f; }
