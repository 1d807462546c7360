/* The adjusted cross entropy of all experts on a CPU: every logit is read from memory once and its
 * gradient written once, a row at a time, by way of a scratch that stays in the cache.
 *
 * Plain C without the headers of Python or PyTorch; native.py packs what is here a struct. Strides are
 * counted in elements. Rows are independent and sums run in an order that follows from the sizes, so
 * results do not depend on the number of threads. */

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* glibc gave some of these functions new versions, which older systems lack. The first version does the same
 * here, so a wheel that is built on a new system runs on an old one. (Zig links for an old glibc as well, but
 * its clang calls LLVM's OpenMP, and PyTorch brings GNU's.) */
#if defined(__x86_64__) && defined(__GLIBC__)
#define FIRST_VERSION(function) __asm__(".symver " #function "," #function "@GLIBC_2.2.5")
FIRST_VERSION(acos);
FIRST_VERSION(acosf);
FIRST_VERSION(exp);
FIRST_VERSION(expm1);
FIRST_VERSION(log);
FIRST_VERSION(pow);
#endif

/* Loops whose strides or outputs are constants of the caller. */
#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#else
#define INLINE static inline
#define NOINLINE
#endif

/* Bytes to which rows of a scratch are aligned; numbers that are read, and added to, at once; classes of a
 * sample that are few; rows of a scratch, beside the table's. */
enum { CACHE_LINE = 64, BLOCK = 64, LANES = 16, FEW = 8, PLAIN_ROWS = 2, MIXED_ROWS = 7 };

/* LANES numbers. As an array compilers may keep them in memory, where each addition waits for the last. */
#ifdef __GNUC__
#define WIDE(A) __attribute__((vector_size(LANES * sizeof(A)), aligned(CACHE_LINE), may_alias))
typedef float lanes_float WIDE(float);
typedef double lanes_double WIDE(double);
#define ADD_LANES(to, from, A) ((to) += *(const lanes_##A *)(from))
#else
typedef float lanes_float[LANES];
typedef double lanes_double[LANES];
#define ADD_LANES(to, from, A) for (int lane = 0; lane < LANES; lane++) (to)[lane] += (from)[lane]
#endif

/* What the functions return. */
enum { DONE, OUT_OF_MEMORY };
enum { F64, F32, BF16, F16, INDEX };

/* Tensors of any dtype and strides; those that are not given begin at NULL. */
typedef struct { const void *at; int64_t dtype, s0; } Vector;
typedef struct { const void *at; int64_t dtype, s0, s1; } Matrix;
typedef struct { const void *at; int64_t dtype, s0, s1, s2; } Cube;

/* The logits of k experts [N, k, C], and their gradient, which may be the same memory. */
typedef struct { Cube logits, gradient; int64_t k; } Block;

/* A is double for F64, else float. */
typedef struct {
    double smoothing, gamma;
    Matrix target;         /* class indices [N], or probabilities [N, C] */
    Matrix table;          /* [K, C] */
    Matrix weights;        /* [N, K] */
    Vector class_weight;   /* [C] */
    Vector margin;         /* [C] */
    Vector divisor;        /* a scalar */
    Vector upstream;       /* [N], for backward */
    void *result;          /* A: the losses [N], or the sum of them over the divisor; NULL: backward */
    void *state;           /* A [N, K, 2]: maximum of a row and sum of its exponentials; backward reads it */
    int64_t N, K, C, ignore_index, dtype, threads, reduce;
    int64_t blocks;
    Block block[];
} Batch;

/* One expert's logits [N, C] and gradient. */
typedef struct {
    const char *logits;
    char *gradient;
    int64_t vn, vc, gn, gc;
} Expert;

/* A batch, and what follows from it for all rows. */
typedef struct {
    const Batch *batch;
    const Expert *experts;
    double *losses; /* [N, K] */
    double divisor;
    int64_t pitch;  /* C, rounded up to LANES: rows of a scratch are aligned and full */
    int mixed;      /* the loss of a row is a sum over classes, and rows run sample by sample */
} Call;

static inline int64_t width(int64_t dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

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

#define number number_baseline

/* The functions that are compiled for every generation of processor. */
typedef struct {
    void (*rows)(const Call *, int64_t, int64_t, void *);
    int64_t (*classes_of)(const Matrix *, int64_t, int64_t, int64_t, int64_t *, double *);
    double (*cosine)(const char *, int64_t, int64_t, const char *, int64_t, int64_t, int64_t);
} Generation;

static const Generation *fastest(void) {
#define GENERATION(name) static const Generation name = {rows_##name, classes_of_##name, cosine_##name}
    GENERATION(baseline);
#ifdef GENERATIONS
    GENERATION(avx2);
    GENERATION(avx512);
    if (__builtin_cpu_supports("x86-64-v4")) return &avx512;
    if (__builtin_cpu_supports("x86-64-v3")) return &avx2;
#endif
    return &baseline;
}

static void store(void *values, int64_t dtype, int64_t offset, double value) {
    if (dtype == F64) ((double *)values)[offset] = value;
    else ((float *)values)[offset] = (float)value;
}

/* The experts of all blocks, in order; NULL without memory. */
static Expert *experts_of(const Block *block, int64_t blocks, int64_t K) {
    Expert *experts = malloc((K ? K : 1) * sizeof(Expert)), *next = experts;
    if (!experts) return NULL;
    for (int64_t i = 0; i < blocks; i++) {
        const Cube v = block[i].logits, g = block[i].gradient;
        const int64_t bytes = width(v.dtype);
        for (int64_t k = 0; k < block[i].k; k++)
            *next++ = (Expert){(const char *)v.at + k * v.s1 * bytes,
                               g.at ? (char *)g.at + k * g.s1 * bytes : NULL, v.s0, v.s2, g.s0, g.s2};
    }
    return experts;
}

/* A fresh gradient is one page fault after another; large pages are few. */
static void ask_for_large_pages(const Batch *b) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21, fresh_each_time = 1 << 23;
    for (int64_t i = 0; i < b->blocks; i++) {
        const Cube g = b->block[i].gradient;
        if (!g.at || g.at == b->block[i].logits.at || !b->N || !b->C || !b->block[i].k) continue;
        const uintptr_t bytes =
            width(g.dtype) * (1 + (b->N - 1) * g.s0 + (b->block[i].k - 1) * g.s1 + (b->C - 1) * g.s2);
        const uintptr_t begin = ((uintptr_t)g.at + page - 1) & ~(page - 1), end = (uintptr_t)g.at + bytes;
        if (bytes >= fresh_each_time && end > begin + page) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
    }
#else
    (void)b;
#endif
}

/* The losses of the samples, or their sum over the divisor. */
static void sum_up(const Call *call) {
    const Batch *b = call->batch;
    const int64_t exact = b->dtype == F64 ? F64 : F32;
    double total = 0.0;
    if (b->reduce) {
        for (int64_t nk = 0; nk < b->N * b->K; nk++) total += call->losses[nk];
        store(b->result, exact, 0, total / call->divisor);
        return;
    }
    for (int64_t n = 0; n < b->N; n++) {
        store(b->result, exact, n, 0);
        for (int64_t k = 0; k < b->K; k++)
            store(b->result, exact, n, number(b->result, exact, n) + call->losses[n * b->K + k]);
    }
}

/* Eq. 9 for a batch and, where a gradient is given, its derivative. */
int lgla_cross_entropy(const Batch *b) {
    const Generation *generation = fastest();
    const int64_t all = b->N * b->K, share = all ? (all + b->threads - 1) / b->threads : 1;
    Expert *experts = experts_of(b->block, b->blocks, b->K);
    double *losses = b->result ? malloc((all ? all : 1) * sizeof(double)) : NULL;
    Call call = {b, experts, losses, 1.0, (b->C + LANES - 1) / LANES * LANES, 0};
    int status = experts && (losses || !b->result) ? DONE : OUT_OF_MEMORY;

    call.mixed = b->target.dtype != INDEX || (b->smoothing > 0 && (b->class_weight.at || b->gamma != 0));
    if (b->divisor.at) call.divisor = number(b->divisor.at, b->divisor.dtype, 0);
    if (call.divisor == 0) call.divisor = 1.0;
    ask_for_large_pages(b);

    if (!status) {
        const int64_t scratch_rows = call.mixed ? b->K + MIXED_ROWS : PLAIN_ROWS;
        const size_t size = b->dtype == F64 ? sizeof(double) : sizeof(float);
        const size_t bytes = (size_t)(scratch_rows * (call.pitch ? call.pitch : LANES)) * size;
#pragma omp parallel for num_threads(b->threads) if (b->threads > 1) reduction(| : status)
        for (int64_t begin = 0; begin < all; begin += share) {
            void *scratch = aligned_alloc(CACHE_LINE, bytes);
            if (scratch) generation->rows(&call, begin, begin + share < all ? begin + share : all, scratch);
            status |= scratch ? DONE : OUT_OF_MEMORY;
            free(scratch);
        }
    }
    if (!status && losses) sum_up(&call);

    free(losses);
    free(experts);
    return status;
}

/* Parts whose sums are added up at the end; their number depends on the work alone. */
enum { MOST_PARTS = 64, WORTH_PARTS = 1 << 16 };
static int64_t parts_of(int64_t work) { return work < WORTH_PARTS ? 1 : MOST_PARTS; }

typedef struct {
    double scale;               /* of cosine logits */
    Matrix target;              /* class indices [N], or probabilities [N, C] */
    Vector group_index;         /* [C] */
    Vector sample_weight;       /* [N] */
    Cube features, centres;     /* [N, K, d] and [K, C, d], without blocks */
    Matrix given;               /* angles [N, K] */
    void *angles;               /* A [N, K], to be written, or NULL */
    double *parts;              /* [B, G, K + 1]: sums of angles, and of the samples' weights */
    void *weights;              /* A [N, K], to be written */
    double *samples;            /* the sum of the samples' weights over the ranks */
    int64_t N, K, C, G, d, B, ignore_index, dtype, threads, ranks;
    int64_t blocks;             /* of cosine logits */
    Block block[];
} Samples;

/* The angle of Eq. 7 between a sample and a class. */
static double angle_of(const Samples *s, const Generation *generation, const Expert *experts, int64_t n,
                       int64_t k, int64_t y) {
    double cosine;
    if (s->given.at) return number(s->given.at, s->given.dtype, n * s->given.s0 + k * s->given.s1);
    if (!s->blocks) {
        const Cube f = s->features, w = s->centres;
        cosine = generation->cosine((const char *)f.at + (n * f.s0 + k * f.s1) * width(f.dtype), f.dtype, f.s2,
                                    (const char *)w.at + (k * w.s0 + y * w.s1) * width(w.dtype), w.dtype, w.s2,
                                    s->d);
    } else {
        cosine = number(experts[k].logits, s->block[0].logits.dtype, n * experts[k].vn + y * experts[k].vc);
        cosine = s->dtype == F64 ? cosine / s->scale : (float)cosine / (float)s->scale;
    }
    cosine = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine; /* a NaN stays one */
    return s->dtype == F64 ? acos(cosine) : acosf((float)cosine);
}

/* The classes that a sample belongs to, and with what probability; none where it is ignored. */
typedef struct {
    double *shares; /* NULL without memory */
    int64_t *classes, count;
} Membership;

static Membership room_for_membership(const Matrix *target, int64_t C) {
    const int64_t most = target->dtype == INDEX || !C ? 1 : C;
    double *shares = malloc(most * (sizeof(double) + sizeof(int64_t)));
    return (Membership){shares, (int64_t *)(shares + most), 0};
}

static void read_membership(Membership *of, const Generation *generation, const Matrix *target,
                            int64_t ignore_index, int64_t n, int64_t C) {
    if (target->dtype != INDEX) {
        of->count = generation->classes_of(target, n, C, C, of->classes, of->shares);
        return;
    }
    const int64_t y = ((const int64_t *)target->at)[n * target->s0];
    of->classes[0] = y, of->shares[0] = 1.0;
    of->count = y != ignore_index && y >= 0 && y < C;
}

static double weight_of(const Vector *weights, int64_t i) {
    return weights->at ? number(weights->at, weights->dtype, i * weights->s0) : 1.0;
}

static int64_t group_of(const Samples *s, int64_t y) {
    return ((const int64_t *)s->group_index.at)[y * s->group_index.s0];
}

/* What the samples from `begin` on add to the sums of their groups. */
static int add_angles(const Samples *s, const Generation *generation, const Expert *experts, int64_t begin,
                      int64_t end, double *parts) {
    Membership of = room_for_membership(&s->target, s->C);
    if (!of.shares) return OUT_OF_MEMORY;
    memset(parts, 0, s->G * (s->K + 1) * sizeof(double));

    for (int64_t n = begin; n < end; n++) {
        const double weight = weight_of(&s->sample_weight, n);
        read_membership(&of, generation, &s->target, s->ignore_index, n, s->C);
        for (int64_t k = 0; s->angles && !of.count && k < s->K; k++) store(s->angles, s->dtype, n * s->K + k, 0);
        for (int64_t i = 0; i < of.count; i++) {
            const int64_t group = group_of(s, of.classes[i]);
            double *sums = (uint64_t)group < (uint64_t)s->G ? parts + group * (s->K + 1) : NULL;
            for (int64_t k = 0; k < s->K; k++) {
                const double angle = angle_of(s, generation, experts, n, k, of.classes[i]);
                if (s->angles) store(s->angles, s->dtype, n * s->K + k, angle);
                if (sums) sums[k] += weight * of.shares[i] * angle;
            }
            if (sums) sums[s->K] += weight * of.shares[i];
        }
    }
    free(of.shares);
    return DONE;
}

/* The angles of Eq. 7 and what a batch adds to their means by group. */
int lgla_statistics(const Samples *s) {
    const Generation *generation = fastest();
    Expert *experts = experts_of(s->block, s->blocks, s->K);
    int status = experts ? DONE : OUT_OF_MEMORY;
    if (!status) {
#pragma omp parallel for num_threads(s->threads) if (s->threads > 1) reduction(| : status)
        for (int64_t part = 0; part < s->B; part++)
            status |= add_angles(s, generation, experts, s->N * part / s->B, s->N * (part + 1) / s->B,
                                 s->parts + part * s->G * (s->K + 1));
    }
    free(experts);
    return status;
}

/* The reference angles [G, K + 1], with the sums of weights as the last column; NULL without memory. */
static double *references_of(const Samples *s) {
    const int64_t columns = s->K + 1, all = s->G * columns;
    double *means = calloc(all ? all : 1, sizeof(double));
    if (!means) return NULL;
    for (int64_t part = 0; part < s->B; part++)
        for (int64_t i = 0; i < all; i++) means[i] += s->parts[part * all + i];
    for (int64_t g = 0; g < s->G; g++)
        for (int64_t k = 0; k < s->K; k++)
            means[g * columns + k] /= means[g * columns + s->K] > 0 ? means[g * columns + s->K] : 1;
    return means;
}

/* Eq. 8 for the samples from `begin` on. */
static int weigh(const Samples *s, const Generation *generation, const Expert *experts, const double *means,
                 int64_t begin, int64_t end) {
    Membership of = room_for_membership(&s->target, s->C);
    if (!of.shares) return OUT_OF_MEMORY;

    for (int64_t n = begin; n < end; n++) {
        const double weight = weight_of(&s->sample_weight, n);
        read_membership(&of, generation, &s->target, s->ignore_index, n, s->C);
        for (int64_t k = 0; k < s->K; k++) {
            double sum = 0;
            for (int64_t i = 0; i < of.count; i++) {
                const int64_t group = group_of(s, of.classes[i]);
                if ((uint64_t)group >= (uint64_t)s->G) continue;
                const double angle = angle_of(s, generation, experts, n, k, of.classes[i]);
                const double excess = angle - means[group * (s->K + 1) + k];
                sum += of.shares[i] * (excess <= 0 ? 1 : 1 + excess); /* a NaN stays one */
            }
            store(s->weights, s->dtype, n * s->K + k, weight * sum);
        }
    }
    free(of.shares);
    return DONE;
}

/* Eq. 8. */
int lgla_weights(const Samples *s) {
    const Generation *generation = fastest();
    const int64_t share = s->N ? (s->N + s->threads - 1) / s->threads : 1;
    Expert *experts = experts_of(s->block, s->blocks, s->K);
    double *means = references_of(s), samples = 0.0;
    int status = experts && means ? DONE : OUT_OF_MEMORY;
    if (!status) {
#pragma omp parallel for num_threads(s->threads) if (s->threads > 1) reduction(| : status)
        for (int64_t begin = 0; begin < s->N; begin += share)
            status |= weigh(s, generation, experts, means, begin, begin + share < s->N ? begin + share : s->N);
        for (int64_t g = 0; g < s->G; g++) samples += means[g * (s->K + 1) + s->K];
        *s->samples = samples / (double)s->ranks;
    }
    free(means);
    free(experts);
    return status;
}

typedef struct {
    Matrix target;
    Vector sample_weight, class_weight;
    double *result;
    int64_t N, C, ignore_index, threads;
} Count;

/* The weights of the samples from `begin` on that are not ignored. */
static int count(const Count *c, const Generation *generation, int64_t begin, int64_t end, double *total) {
    Membership of = room_for_membership(&c->target, c->C);
    if (!of.shares) return OUT_OF_MEMORY;
    *total = 0.0;
    for (int64_t n = begin; n < end; n++) {
        double sum = 0.0;
        read_membership(&of, generation, &c->target, c->ignore_index, n, c->C);
        for (int64_t i = 0; i < of.count; i++) sum += of.shares[i] * weight_of(&c->class_weight, of.classes[i]);
        if (of.count) *total += sum * weight_of(&c->sample_weight, n);
    }
    free(of.shares);
    return DONE;
}

/* The weights of all samples that are not ignored. */
int lgla_count(const Count *c) {
    const Generation *generation = fastest();
    const int64_t parts = parts_of(c->N * (c->target.dtype == INDEX ? 1 : c->C));
    double totals[MOST_PARTS];
    int status = DONE;
#pragma omp parallel for num_threads(c->threads) if (c->threads > 1) reduction(| : status)
    for (int64_t part = 0; part < parts; part++)
        status |= count(c, generation, c->N * part / parts, c->N * (part + 1) / parts, totals + part);
    *c->result = 0.0;
    for (int64_t part = 0; part < parts; part++) *c->result += totals[part];
    return status;
}

/* Tells a library that was compiled from other sources than the caller's. */
int64_t lgla_layout(void) {
    return 1000000 * (int64_t)sizeof(Batch) + 1000 * (int64_t)sizeof(Samples) + (int64_t)(sizeof(Count) + sizeof(Block));
}
