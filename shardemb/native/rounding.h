/* Rounds to 16 bits: to the nearest, or stochastically as `shardemb/updates/rounding.py` says. */

#ifndef SHARDEMB_ROUNDING_H
#define SHARDEMB_ROUNDING_H

#include "rows.h"

INLINE vuint chosen(vint where, vuint yes, vuint no)
{
    return ((vuint)where & yes) | (~(vuint)where & no);
}

/* To the nearest bfloat16, a tie to the even one. */
INLINE vuint nearest_brain(vfloat value)
{
    vuint bits = (vuint)value, quiet = bits >> 16 | 0x40;
    return chosen(value == value, (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet);
}

/* To the nearest float16, a tie to the even one. */
INLINE vuint nearest_half(vfloat value)
{
    vuint sign = (vuint)value >> 16 & 0x8000, magnitude = (vuint)value & 0x7fffffff;
    vuint normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    /* float32 rounds to the step of subnormals, as it adds a number of that step */
    vuint subnormal = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000u;
    vuint half = chosen(magnitude < 0x38800000u, subnormal, normal);
    half = chosen(magnitude >= 0x477ff000u, (vuint){0} + 0x7c00, half);
    return sign | chosen(magnitude > 0x7f800000u, (vuint){0} + 0x7e00, half);
}

/* Up where 16 random bits are below the value's part of the step to its neighbour. */
INLINE vuint half_by_chance(vfloat value, vuint random)
{
    vuint sign = (vuint)value >> 16 & 0x8000, magnitude = (vuint)value & 0x7fffffff;
    vint is_between = magnitude <= 0x477fe000u; /* 65504, beyond which there is no neighbour */
    magnitude &= (vuint)is_between;
    vuint exponent = magnitude >> 23;
    exponent = chosen(exponent > 113, exponent, (vuint){0} + 113); /* of the least normal float16 */
    vfloat steps = (vfloat)magnitude / (vfloat)((exponent - 10) << 23);
    vint down = __builtin_convertvector(steps, vint);
    vfloat part = (steps - __builtin_convertvector(down, vfloat)) * 65536.0f;
    vint is_up = __builtin_convertvector((vint)random, vfloat) < part;
    vuint half = ((exponent - 113) << 10) + (vuint)down - (vuint)is_up;
    return chosen(is_between, sign | half, nearest_half(value));
}

INLINE vuint brain_by_chance(vfloat value, vuint random)
{
    vint is_between = ((vuint)value & 0x7fffffff) <= 0x7f7f0000u; /* the largest bfloat16 */
    return chosen(is_between, ((vuint)value + random) >> 16, nearest_brain(value));
}

INLINE vhalf round_lanes(vfloat value, int dtype, int stochastic, vuint random)
{
    vuint rounded;
    if (dtype == FLOAT16)
        rounded = stochastic ? half_by_chance(value, random) : nearest_half(value);
    else
        rounded = stochastic ? brain_by_chance(value, random) : nearest_brain(value);
    return __builtin_convertvector(rounded, vhalf);
}

/* SplitMix64's output at an index, from 0, for a seed. */
INLINE uint64_t drawn(uint64_t seed, uint64_t index)
{
    uint64_t mixed = seed + 0x9E3779B97F4A7C15u * (index + 1);
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
    return mixed ^ mixed >> 31;
}

/* 16 random bits for each of sixteen columns: 64 serve four columns from a multiple of four on. */
INLINE vuint drawn_lanes(uint64_t seed, int64_t column)
{
    uint64_t bits[LANES / 4 + 1];
    vhalf lanes;
    for (int64_t four = 0; four < LANES / 4 + (column % 4 != 0); four++)
        bits[four] = drawn(seed, (uint64_t)(column / 4 + four));
    memcpy(&lanes, (const uint16_t *)bits + column % 4, sizeof lanes);
    return __builtin_convertvector(lanes, vuint);
}

#endif
