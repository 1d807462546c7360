/* The rows of native.c, compiled once for every generation of processor: VARIANT(name) gives each copy
 * its own names. A is the arithmetic type, V the storage type of the logits. */

/* The bits of one type as another. */
#define BITS(to, from, name)                                                                            \
    static inline to VARIANT(name)(from value) {                                                        \
        to result;                                                                                      \
        memcpy(&result, &value, sizeof(to));                                                            \
        return result;                                                                                  \
    }
BITS(uint32_t, float, bits32)
BITS(float, uint32_t, float32)
BITS(uint64_t, double, bits64)
BITS(double, uint64_t, float64)
#undef BITS
#define bits32 VARIANT(bits32)
#define float32 VARIANT(float32)
#define bits64 VARIANT(bits64)
#define float64 VARIANT(float64)

static inline double VARIANT(from_f64)(double v) { return v; }
static inline double VARIANT(to_f64)(double v) { return v; }
static inline float VARIANT(from_f32)(float v) { return v; }
static inline float VARIANT(to_f32)(float v) { return v; }

static inline float VARIANT(from_bf16)(uint16_t v) { return float32((uint32_t)v << 16); }

static inline uint16_t VARIANT(to_bf16)(float v) {
    uint32_t bits = bits32(v), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static inline float VARIANT(from_f16)(uint16_t v) {
    uint32_t magnitude = v & 0x7fff;
    uint32_t bits = bits32(float32(magnitude << 13) * 0x1p112f); /* moves the exponent's bias */
    bits = magnitude >= 0x7c00 ? bits | 0x7f800000 : bits;
    return float32(bits | (uint32_t)(v & 0x8000) << 16);
}

static inline uint16_t VARIANT(to_f16)(float v) {
    uint32_t sign = bits32(v) & 0x80000000, bits = bits32(v) ^ sign;
    uint32_t normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    uint32_t subnormal = bits32(float32(bits) + 0.5f) - 0x3f000000; /* the addition rounds */
    uint32_t large = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    uint32_t half = bits >= 0x47800000 ? large : bits < 0x38800000 ? subnormal : normal;
    return (uint16_t)(half | sign >> 16);
}

/* exp(x) for x <= 0 to about one unit in the last place, 0 where it is below the normal numbers:
 * x = n log 2 + r by rounding in an addition, exp(r) by a polynomial, n into the exponent. */
static inline float VARIANT(exp_float)(float x) {
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return x < -87.0f ? 0.0f : float32(bits32(p) + (bits32(shifted) << 23));
}

static inline double VARIANT(exp_double)(double x) {
    double shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52, n = shifted - 0x1.8p52;
    double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    return x < -708.0 ? 0.0 : float64(bits64(p) + (bits64(shifted) << 52));
}

/* T + v of class j. */
#define ADJUSTED(NAME) (VARIANT(from_##NAME)(v[j * stride]) + table[j])

#define STORAGE(NAME, V, A)                                                                             \
    /* The maximum of an adjusted row, and whether a NaN or +inf is in it. */                           \
    INLINE A VARIANT(max_##NAME)(const V *v, int64_t stride, const A *table, int64_t C,                 \
                                        int32_t *wrong) {                                               \
        A max = -INFINITY;                                                                              \
        int32_t any = 0;                                                                                \
        _Pragma("omp simd reduction(max : max) reduction(| : any)")                                     \
        for (int64_t j = 0; j < C; j++) {                                                               \
            A value = ADJUSTED(NAME);                                                                   \
            any |= !(value < (A)INFINITY);                                                              \
            max = value > max ? value : max;                                                            \
        }                                                                                               \
        *wrong = any;                                                                                   \
        return max;                                                                                     \
    }                                                                                                   \
    INLINE double VARIANT(below_##NAME)(const V *v, int64_t stride, const A *table, A max,              \
                                               int64_t C) {                                             \
        double sum = 0.0;                                                                               \
        _Pragma("omp simd reduction(+ : sum)")                                                          \
        for (int64_t j = 0; j < C; j++) sum += ADJUSTED(NAME) - max;                                    \
        return sum;                                                                                     \
    }                                                                                                   \
    /* The sum of exp(x - max), each kept in `kept` if that is given. Few terms are added up in one     \
     * number of type A, as a thousand times 1 + 1e-8 is still 1 in float. */                           \
    INLINE double VARIANT(sum_##NAME)(const V *v, int64_t stride, const A *table, A max,                \
                                      A *restrict kept, int64_t C) {                                    \
        double total = 0.0;                                                                             \
        for (int64_t start = 0; start < C; start += 1024) {                                             \
            A lanes[16] = {0};                                                                          \
            const int64_t end = start + 1024 < C ? start + 1024 : C, whole = end - (end - start) % 16;  \
            for (int64_t i = start; i < whole; i += 16) {                                               \
                _Pragma("omp simd")                                                                     \
                for (int64_t j = i; j < i + 16; j++) {                                                  \
                    const A e = VARIANT(exp_##A)(ADJUSTED(NAME) - max);                                 \
                    if (kept) kept[j] = e;                                                              \
                    lanes[j - i] += e;                                                                  \
                }                                                                                       \
            }                                                                                           \
            for (int64_t j = whole; j < end; j++) {                                                     \
                const A e = VARIANT(exp_##A)(ADJUSTED(NAME) - max);                                     \
                if (kept) kept[j] = e;                                                                  \
                lanes[j - whole] += e;                                                                  \
            }                                                                                           \
            for (int lane = 0; lane < 16; lane++) total += lanes[lane];                                 \
        }                                                                                               \
        return total;                                                                                   \
    }                                                                                                   \
    /* gradient = factor exp(x - max) - shift; the gradient may lie over the logits. */                 \
    INLINE void VARIANT(write_##NAME)(V *gradient, int64_t to, const V *v, int64_t stride,              \
                                             const A *table, A max, A factor, A shift, int64_t C) {     \
        _Pragma("omp simd")                                                                             \
        for (int64_t j = 0; j < C; j++) {                                                               \
            A e = VARIANT(exp_##A)(ADJUSTED(NAME) - max);                                               \
            gradient[j * to] = VARIANT(to_##NAME)(factor * e - shift);                                  \
        }                                                                                               \
    }                                                                                                   \
    /* The same from exponentials that were kept; factor 0 takes none. */                               \
    INLINE void VARIANT(scale_##NAME)(V *gradient, int64_t to, const A *restrict kept,                  \
                                             A factor, A shift, int64_t C) {                            \
        _Pragma("omp simd")                                                                             \
        for (int64_t j = 0; j < C; j++)                                                                 \
            gradient[j * to] = VARIANT(to_##NAME)(factor == 0 ? 0 : factor * kept[j] - shift);          \
    }                                                                                                   \
                                                                                                        \
    static int VARIANT(rows_##NAME)(const Batch *b, int64_t begin, int64_t end, void *scratch) {        \
        const double e = b->smoothing;                                                                  \
        const int64_t C = b->C;                                                                         \
        const int dense = b->vc == 1, dense_gradient = b->gc == 1;                                      \
        A *table = scratch, *kept = b->gradient ? table + C : NULL;                                     \
        int64_t expert = -1;                                                                            \
        int status = 0;                                                                                 \
        for (int64_t row = begin; row < end; row++) {                                                   \
            const int64_t k = row / b->N, n = row % b->N, nk = n * b->K + k, y = b->target[n];          \
            const V *v = (const V *)b->logits + n * b->vn + k * b->vk;                                  \
            V *gradient = b->gradient ? (V *)b->gradient + n * b->gn + k * b->gk : NULL;                \
            A *loss = (A *)b->losses + nk, *state = (A *)b->state + 2 * nk;                             \
            const double weight = b->weights ? ((const A *)b->weights)[nk] : 1.0;                       \
            double scale, sum;                                                                          \
            A max = 0;                                                                                  \
            int32_t wrong = 0;                                                                          \
            const int ignored = y == b->ignore_index, outside = !ignored && (y < 0 || y >= C);          \
                                                                                                        \
            if (k != expert) {                                                                          \
                for (int64_t j = 0; j < C; j++) table[j] = b->table ? (A)b->table[k * C + j] : 0;       \
                expert = k;                                                                             \
            }                                                                                           \
            if (!b->upstream && (!ignored || b->check)) {                                               \
                max = dense ? VARIANT(max_##NAME)(v, 1, table, C, &wrong)                               \
                            : VARIANT(max_##NAME)(v, b->vc, table, C, &wrong);                          \
                if (wrong) status |= NOT_FINITE;                                                        \
            }                                                                                           \
            if (ignored || outside) {                                                                   \
                if (outside) status |= TARGET_OUT_OF_RANGE;                                             \
                if (!b->upstream) *loss = 0, state[0] = 0, state[1] = 1;                                \
                if (gradient) VARIANT(scale_##NAME)(gradient, b->gc, kept, 0, 0, C);                    \
                continue;                                                                               \
            }                                                                                           \
            const A own = VARIANT(from_##NAME)(v[y * b->vc]) + table[y];                                \
            if (b->upstream) {                                                                          \
                max = state[0], sum = state[1];                                                         \
                scale = weight * ((const A *)b->upstream)[n * b->un];                                   \
                const A factor = (A)(scale / sum), shift = (A)(scale * e / C);                          \
                if (dense && dense_gradient)                                                            \
                    VARIANT(write_##NAME)(gradient, 1, v, 1, table, max, factor, shift, C);             \
                else                                                                                    \
                    VARIANT(write_##NAME)(gradient, b->gc, v, b->vc, table, max, factor, shift, C);     \
            } else {                                                                                    \
                if (!dense) sum = VARIANT(sum_##NAME)(v, b->vc, table, max, kept, C);                   \
                else if (kept) sum = VARIANT(sum_##NAME)(v, 1, table, max, kept, C);                    \
                else sum = VARIANT(sum_##NAME)(v, 1, table, max, NULL, C);                              \
                if (wrong) sum = NAN;                                                                   \
                if (own == -INFINITY) status |= NOT_FINITE;                                             \
                double value = (1 - e) * (log(sum) - ((double)own - max));                              \
                if (e > 0) value += e * (log(sum) - VARIANT(below_##NAME)(v, b->vc, table, max, C) / C); \
                *loss = (A)(weight * value);                                                            \
                state[0] = max, state[1] = (A)sum;                                                      \
                if (!gradient) continue;                                                                \
                scale = weight * (A)(1 / b->divisor), sum = (A)sum; /* as backward would have them */   \
                const A factor = (A)(scale / sum), shift = (A)(scale * e / C);                          \
                if (dense_gradient) VARIANT(scale_##NAME)(gradient, 1, kept, factor, shift, C);         \
                else VARIANT(scale_##NAME)(gradient, b->gc, kept, factor, shift, C);                    \
            }                                                                                           \
            gradient[y * b->gc] = VARIANT(to_##NAME)((A)(scale * (exp((double)own - max) / sum - (1 - e) - e / C))); \
        }                                                                                               \
        return status;                                                                                  \
    }
STORAGE(f64, double, double)
STORAGE(f32, float, float)
STORAGE(bf16, uint16_t, float)
STORAGE(f16, uint16_t, float)
#undef STORAGE
#undef ADJUSTED
#undef bits32
#undef float32
#undef bits64
#undef float64

static int VARIANT(rows)(const Batch *b, int64_t begin, int64_t end, void *scratch) {
    switch (b->dtype) {
    case F64: return VARIANT(rows_f64)(b, begin, end, scratch);
    case F32: return VARIANT(rows_f32)(b, begin, end, scratch);
    case BF16: return VARIANT(rows_bf16)(b, begin, end, scratch);
    default: return VARIANT(rows_f16)(b, begin, end, scratch);
    }
}
