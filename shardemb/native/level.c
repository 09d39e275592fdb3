/* Which instructions this machine has, and from which sources a library was built. */

#ifndef SE_SOURCES
#define SE_SOURCES 0
#endif

/* CRC-32 of all sources. */
unsigned int se_sources(void) { return SE_SOURCES; }

/* The x86-64 level that the machine can run: 4 (AVX-512), 3 (AVX2), or 1; elsewhere 1. */
int se_level(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))
        return 3;
#endif
    return 1;
}
