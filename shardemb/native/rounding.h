/* Rounds rows to 16 bits: to the nearest, or stochastically as `shardemb/updates/rounding.py` says. */

#ifndef SHARDEMB_ROUNDING_H
#define SHARDEMB_ROUNDING_H

#include "rows.h"

INLINE uint32_t bits_of_float(float value)
{
    union { float value; uint32_t bits; } both = {value};
    return both.bits;
}

INLINE float float_of_bits(uint32_t bits)
{
    union { uint32_t bits; float value; } both = {bits};
    return both.value;
}

/* To the nearest bfloat16, a tie to the even one. */
INLINE uint16_t brain_of_float(float value)
{
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return value == value ? (uint16_t)rounded : (uint16_t)(bits >> 16 | 0x40);
}

/* To the nearest float16, a tie to the even one. */
INLINE uint16_t half_of_float(float value)
{
    uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x7f800000u)
        return (uint16_t)(sign | 0x7c00 | (magnitude > 0x7f800000u ? 0x200 : 0));
    if (magnitude >= 0x477ff000u)
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000u) { /* subnormal: float32 rounds as it adds a number of that step */
        float shifted = float_of_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (bits_of_float(shifted) - 0x3f000000u));
    }
    uint32_t odd = magnitude >> 13 & 1;
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

/* SplitMix64's output at an index, from 0, for a seed. */
INLINE uint64_t drawn(uint64_t seed, uint64_t index)
{
    uint64_t mixed = seed + 0x9E3779B97F4A7C15u * (index + 1);
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
    return mixed ^ mixed >> 31;
}

/* Up where 16 random bits are below the value's part of the step to its neighbour. */
INLINE uint16_t half_by_chance(float value, uint32_t random)
{
    uint32_t magnitude = bits_of_float(value) & 0x7fffffff;
    uint32_t exponent = magnitude >> 23 > 113 ? magnitude >> 23 : 113;
    float step = float_of_bits((exponent - 10) << 23);
    float steps = fabsf(value) / step, down = floorf(steps);
    float rounded = (down + ((float)random < (steps - down) * 65536.0f ? 1.0f : 0.0f)) * step;
    return half_of_float(copysignf(rounded, value));
}

INLINE uint16_t round_one(float value, int dtype, int stochastic, uint32_t random)
{
    if (dtype == FLOAT16)
        return stochastic && fabsf(value) <= 65504.0f ? half_by_chance(value, random)
                                                      : half_of_float(value);
    if (stochastic && fabsf(value) <= 0x1.fep127f)
        return (uint16_t)((bits_of_float(value) + random) >> 16);
    return brain_of_float(value);
}

#endif
