// The vector types, aligned as on the device: a float4 at an address that is no multiple of 16 is
// an error there, and reported here.
#pragma once

// uint3 has its place in interface.h, being the type of threadIdx.
#define CUEMU_VECTOR2(name, T, alignment) \
    struct alignas(alignment) name##2 { \
        T x, y; \
    }; \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }
#define CUEMU_VECTOR3(name, T) \
    struct name##3 { \
        T x, y, z; \
    }; \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }
#define CUEMU_VECTOR4(name, T, alignment) \
    struct alignas(alignment) name##4 { \
        T x, y, z, w; \
    }; \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUEMU_VECTOR2(char, signed char, 2)
CUEMU_VECTOR4(char, signed char, 4)
CUEMU_VECTOR2(uchar, unsigned char, 2)
CUEMU_VECTOR4(uchar, unsigned char, 4)
CUEMU_VECTOR2(short, short, 4)
CUEMU_VECTOR4(short, short, 8)
CUEMU_VECTOR2(ushort, unsigned short, 4)
CUEMU_VECTOR4(ushort, unsigned short, 8)
CUEMU_VECTOR2(int, int, 8)
CUEMU_VECTOR3(int, int)
CUEMU_VECTOR4(int, int, 16)
CUEMU_VECTOR2(uint, unsigned, 8)
CUEMU_VECTOR4(uint, unsigned, 16)
CUEMU_VECTOR2(float, float, 8)
CUEMU_VECTOR3(float, float)
CUEMU_VECTOR4(float, float, 16)
CUEMU_VECTOR2(double, double, 16)
CUEMU_VECTOR2(longlong, long long, 16)
CUEMU_VECTOR2(ulonglong, unsigned long long, 16)

#undef CUEMU_VECTOR2
#undef CUEMU_VECTOR3
#undef CUEMU_VECTOR4
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
