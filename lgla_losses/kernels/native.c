/* The adjusted cross entropy of all experts on a CPU: every logit is read from memory once and its
 * gradient written once, a row at a time, by way of a scratch that stays in the cache.
 *
 * Plain C without the headers of Python or PyTorch; native.py calls it with pointers, and strides
 * counted in elements. Rows are independent and sums run in a fixed order, so results do not depend on
 * the number of threads. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* Loops whose strides or outputs are constants of the caller. */
#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* Bits of what the functions return. */
enum { TARGET_OUT_OF_RANGE = 1, NOT_FINITE = 2, BEYOND_SCALE = 4, OUT_OF_MEMORY = 8 };
enum { F64, F32, BF16, F16 };

/* A is double for F64, else float. */
typedef struct {
    const void *logits;    /* [N, K, C] with strides vn, vk, vc */
    const int64_t *target; /* [N] */
    const double *table;   /* [K, C], or NULL for zeros */
    const void *weights;   /* A [N, K], or NULL for ones */
    const void *upstream;  /* A [N] with stride un: backward, which reads the state; NULL: forward */
    void *losses;          /* A [N, K] */
    void *total;           /* A: the sum of the losses over the divisor, or NULL */
    void *state;           /* A [N, K, 2]: maximum of a row and sum of its exponentials */
    void *gradient;        /* as logits with strides gn, gk, gc, or NULL; may be the logits' memory */
    int64_t N, K, C, vn, vk, vc, gn, gk, gc, un, ignore_index, dtype, check, threads;
    double smoothing, divisor;
    void *fresh;           /* memory of a new gradient, or NULL */
    int64_t fresh_bytes;
} Batch;

#define VARIANT(name) name##_baseline
#include "native_rows.h"
#undef VARIANT

#if defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && defined(__x86_64__)
#define GENERATIONS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define VARIANT(name) name##_avx2
#include "native_rows.h"
#undef VARIANT
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4", "prefer-vector-width=512")
#define VARIANT(name) name##_avx512
#include "native_rows.h"
#undef VARIANT
#pragma GCC pop_options
#endif

typedef int (*Rows)(const Batch *, int64_t, int64_t, void *);

static Rows fastest_rows(void) {
#ifdef GENERATIONS
    if (__builtin_cpu_supports("x86-64-v4")) return rows_avx512;
    if (__builtin_cpu_supports("x86-64-v3")) return rows_avx2;
#endif
    return rows_baseline;
}

static double number(const void *values, int64_t dtype, int64_t offset) {
    switch (dtype) {
    case F64: return ((const double *)values)[offset];
    case F32: return ((const float *)values)[offset];
    case BF16: return from_bf16_baseline(((const uint16_t *)values)[offset]);
    default: return from_f16_baseline(((const uint16_t *)values)[offset]);
    }
}

/* Eq. 9 for a batch and, where a gradient is given, its derivative. */
int lgla_cross_entropy(const Batch *b) {
    const Rows rows = fastest_rows();
    const int64_t all = b->N * b->K, share = all ? (all + b->threads - 1) / b->threads : 1;
    const size_t element = b->dtype == F64 ? sizeof(double) : sizeof(float);
    int status = 0;
#ifdef MADV_HUGEPAGE
    /* A fresh gradient is one page fault after another; large pages are few. */
    const uintptr_t page = 1 << 21, first = ((uintptr_t)b->fresh + page - 1) & ~(page - 1);
    const uintptr_t end = (uintptr_t)b->fresh + (uintptr_t)b->fresh_bytes;
    if (b->fresh && end > first + page) madvise((void *)first, end - first, MADV_HUGEPAGE);
#endif
#pragma omp parallel for num_threads(b->threads) if (b->threads > 1) reduction(| : status)
    for (int64_t begin = 0; begin < all; begin += share) {
        void *scratch = malloc((b->gradient ? 2 : 1) * b->C * element);
        status |= scratch ? rows(b, begin, begin + share < all ? begin + share : all, scratch) : OUT_OF_MEMORY;
        free(scratch);
    }
    if (b->total) {
        double total = 0.0;
        for (int64_t nk = 0; nk < all; nk++) total += number(b->losses, b->dtype == F64 ? F64 : F32, nk);
        if (b->dtype == F64) *(double *)b->total = total / b->divisor;
        else *(float *)b->total = (float)(total / b->divisor);
    }
    return status;
}

typedef struct {
    const void *logits;         /* [N, K, C] with strides vn, vk, vc, or NULL where angles are given */
    const int64_t *target;      /* [N] */
    const int64_t *group_index; /* [C] */
    void *angles;               /* A [N, K] */
    double *statistics;         /* [G, K + 1]: sums of angles, number of samples */
    void *weights;              /* A [N, K] */
    void *samples;              /* A: the samples not ignored, at least 1, over the ranks */
    int64_t N, K, C, G, vn, vk, vc, ignore_index, dtype, ranks;
    double scale;
} Angles;

/* The angles of Eq. 7 and what a batch adds to their means by group. */
int lgla_statistics(const Angles *a) {
    const double beyond = 1.05 * a->scale;
    int status = 0;
    memset(a->statistics, 0, a->G * (a->K + 1) * sizeof(double));
    for (int64_t n = 0; n < a->N; n++) {
        const int64_t y = a->target[n];
        const int ignored = y == a->ignore_index;
        const int outside = !ignored && (y < 0 || y >= a->C || (uint64_t)a->group_index[y] >= (uint64_t)a->G);
        double *sums = ignored || outside ? NULL : a->statistics + a->group_index[y] * (a->K + 1);
        if (outside) status |= TARGET_OUT_OF_RANGE;
        for (int64_t k = 0; k < a->K; k++) {
            const int64_t nk = n * a->K + k;
            if (a->logits) {
                double v = sums ? number(a->logits, a->dtype, n * a->vn + k * a->vk + y * a->vc) : a->scale;
                if (v > beyond) status |= BEYOND_SCALE;
                if (a->dtype == F64) {
                    const double cosine = v / a->scale;
                    ((double *)a->angles)[nk] = acos(cosine > 1 ? 1 : cosine < -1 ? -1 : cosine);
                } else {
                    const float cosine = (float)v / (float)a->scale;
                    ((float *)a->angles)[nk] = acosf(cosine > 1 ? 1 : cosine < -1 ? -1 : cosine);
                }
            }
            if (sums) sums[k] += number(a->angles, a->dtype == F64 ? F64 : F32, nk);
        }
        if (sums) sums[a->K] += 1;
    }
    return status;
}

/* Eq. 8. */
int lgla_weights(const Angles *a) {
    double samples = 0.0;
    for (int64_t g = 0; g < a->G; g++) samples += a->statistics[g * (a->K + 1) + a->K];
    samples = (samples < 1.0 ? 1.0 : samples) / (double)a->ranks;
    if (a->dtype == F64) *(double *)a->samples = samples;
    else *(float *)a->samples = (float)samples;
    for (int64_t n = 0; n < a->N; n++) {
        const int64_t y = a->target[n];
        const int counts = y != a->ignore_index && y >= 0 && y < a->C &&
                           (uint64_t)a->group_index[y] < (uint64_t)a->G;
        const double *sums = counts ? a->statistics + a->group_index[y] * (a->K + 1) : NULL;
        for (int64_t k = 0; k < a->K; k++) {
            const int64_t nk = n * a->K + k;
            double weight = 0;
            if (counts) {
                const double excess = number(a->angles, a->dtype == F64 ? F64 : F32, nk) - sums[k] / sums[a->K];
                weight = excess <= 0 ? 1 : 1 + excess; /* a NaN stays one */
            }
            if (a->dtype == F64) ((double *)a->weights)[nk] = weight;
            else ((float *)a->weights)[nk] = (float)weight;
        }
    }
    return 0;
}

/* Tells a library that was compiled from other sources than the caller's. */
int64_t lgla_layout(void) { return 1000 * (int64_t)sizeof(Batch) + (int64_t)sizeof(Angles); }
