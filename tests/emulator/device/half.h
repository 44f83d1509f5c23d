// f16 and bf16 for kernels: what the device does in one instruction (cvt.f32.f16, cvt.rn.f16.f32
// and the same for bf16), which under CUDA is inline PTX. Narrowing rounds to nearest even and
// gives the device's one NaN, 0x7fff; widening is exact and keeps a NaN's payload.
#pragma once

inline float cuemu_bf16_to_f32(unsigned short bits) {
    return __uint_as_float(unsigned(bits) << 16);
}

inline unsigned short cuemu_f32_to_bf16_rn(float value) {
    if (value != value) return 0x7fff;
    const unsigned bits = __float_as_uint(value);
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float cuemu_f16_to_f32(unsigned short bits) {
    const unsigned sign = unsigned(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) // subnormal
        return __uint_as_float(sign | __float_as_uint(float(magnitude) * 0x1p-24f));
    return __uint_as_float(sign | ((magnitude << 13) + (112u << 23))); // exponent bias 127 - 15
}

inline unsigned short cuemu_f32_to_f16_rn(float value) {
    if (value != value) return 0x7fff;
    const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000;
    const unsigned magnitude = bits & 0x7fffffff;
    unsigned half;
    if (magnitude >= 0x477ff000) // 65520: half way from the largest number to the next
        half = 0x7c00;
    else if (magnitude < 0x38800000) // subnormal: adding 1/2 rounds at the right bit, 2^-24
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
    else
        half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return (unsigned short)(sign | half);
}
