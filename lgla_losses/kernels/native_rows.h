/* The loops of native.c, compiled once for every generation of processor: VARIANT(name) gives each copy
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

static inline double VARIANT(number)(const void *values, int64_t dtype, int64_t offset) {
    switch (dtype) {
    case F64: return ((const double *)values)[offset];
    case F32: return ((const float *)values)[offset];
    case BF16: return VARIANT(from_bf16)(((const uint16_t *)values)[offset]);
    default: return VARIANT(from_f16)(((const uint16_t *)values)[offset]);
    }
}

static inline double VARIANT(entry)(const Vector *v, int64_t i) {
    return VARIANT(number)(v->at, v->dtype, i * v->s0);
}

static inline double VARIANT(weight)(const Batch *b, int64_t n, int64_t k) {
    const Matrix *w = &b->weights;
    return w->at ? VARIANT(number)(w->at, w->dtype, n * w->s0 + k * w->s1) : 1.0;
}

/* The factor (1 - p)^gamma of the focal loss, and the derivative of it times the cross entropy. */
static double VARIANT(focus)(double entropy, double gamma, double *slope) {
    const double missing = -expm1(-entropy), kept = missing < DBL_MIN ? DBL_MIN : missing, p = exp(-entropy);
    const double factor = pow(kept, gamma);
    *slope = factor + (p > 0 ? gamma * pow(kept, gamma - 1) * p * entropy : 0);
    return factor;
}

#define LOAD(NAME, V, A)                                                                                \
    INLINE void VARIANT(load_##NAME##_##A)(const V *from, int64_t stride, A *restrict to, int64_t C) {  \
        _Pragma("omp simd")                                                                             \
        for (int64_t j = 0; j < C; j++) to[j] = (A)VARIANT(from_##NAME)(from[j * stride]);              \
    }
/* Numbers of any storage type as A. */                                                                 \
#define LOADS(A)                                                                                        \
    LOAD(f64, double, A)                                                                                \
    LOAD(f32, float, A)                                                                                 \
    LOAD(bf16, uint16_t, A)                                                                             \
    LOAD(f16, uint16_t, A)                                                                              \
    static void VARIANT(load_##A)(const void *from, int64_t dtype, int64_t stride, A *to, int64_t C) {  \
        switch (dtype * 2 + (stride == 1)) {                                                            \
        case F64 * 2 + 1: VARIANT(load_f64_##A)(from, 1, to, C); break;                                 \
        case F32 * 2 + 1: VARIANT(load_f32_##A)(from, 1, to, C); break;                                 \
        case BF16 * 2 + 1: VARIANT(load_bf16_##A)(from, 1, to, C); break;                               \
        case F16 * 2 + 1: VARIANT(load_f16_##A)(from, 1, to, C); break;                                 \
        case F64 * 2: VARIANT(load_f64_##A)(from, stride, to, C); break;                                \
        case F32 * 2: VARIANT(load_f32_##A)(from, stride, to, C); break;                                \
        case BF16 * 2: VARIANT(load_bf16_##A)(from, stride, to, C); break;                              \
        default: VARIANT(load_f16_##A)(from, stride, to, C);                                            \
        }                                                                                               \
    }
LOADS(float)
LOADS(double)

/* A row of the table, or a vector of the classes; zeros or `otherwise` where there is none. */
#define CONSTANTS(A)                                                                                    \
    static void VARIANT(table_##A)(const Batch *b, int64_t k, A *to) {                                  \
        const Matrix *t = &b->table;                                                                    \
        if (t->at) VARIANT(load_##A)((const char *)t->at + k * t->s0 * width(t->dtype), t->dtype, t->s1, to, b->C);\
        else memset(to, 0, b->C * sizeof(A));                                                           \
    }                                                                                                   \
    static void VARIANT(vector_##A)(const Vector *v, A otherwise, A *to, int64_t C) {                   \
        if (v->at) VARIANT(load_##A)(v->at, v->dtype, v->s0, to, C);                                    \
        for (int64_t j = 0; !v->at && j < C; j++) to[j] = otherwise;                                    \
    }
CONSTANTS(float)
CONSTANTS(double)

/* How much every class counts in the loss of a sample, r: its probabilities, smoothed, times the weights of\
 * the classes. Returns whether any class counts; `mass` is the sum of r. */                            \
#define SHARES(A)                                                                                       \
    static int VARIANT(shares_##A)(const Batch *b, int64_t n, const A *class_weight, A *restrict q,     \
                                   A *restrict r, double *mass) {                                       \
        const Matrix *target = &b->target;                                                              \
        const int64_t C = b->C;                                                                         \
        const double e = b->smoothing;                                                                  \
        double total = 0.0, sum = 0.0;                                                                  \
        int32_t any = 0;                                                                                \
        if (target->dtype == INDEX) {                                                                   \
            const int64_t y = ((const int64_t *)target->at)[n * target->s0];                            \
            memset(q, 0, C * sizeof(A));                                                                \
            if (y != b->ignore_index) q[y < 0 || y >= C ? 0 : y] = y < 0 || y >= C ? NAN : 1;           \
        } else {                                                                                        \
            const char *at = (const char *)target->at + n * target->s0 * width(target->dtype);          \
            VARIANT(load_##A)(at, target->dtype, target->s1, q, C);                                     \
        }                                                                                               \
                                                                                                        \
        _Pragma("omp simd reduction(+ : total) reduction(| : any)")                                     \
        for (int64_t j = 0; j < C; j++) {                                                               \
            total += q[j];                                                                              \
            any |= q[j] != 0;                                                                           \
        }                                                                                               \
                                                                                                        \
        *mass = total;                                                                                  \
        if (r == q) return any;                                                                         \
                                                                                                        \
        const A own = (A)(1 - e), spread = (A)(e * total / C);                                          \
        _Pragma("omp simd reduction(+ : sum)")                                                          \
        for (int64_t j = 0; j < C; j++) {                                                               \
            r[j] = class_weight[j] * (own * q[j] + spread);                                             \
            sum += r[j];                                                                                \
        }                                                                                               \
        *mass = sum;                                                                                    \
        return any;                                                                                     \
    }
SHARES(float)
SHARES(double)

/* The classes of probability other than 0, and these; one more than `most` if there are more. */
static int64_t VARIANT(classes_of)(const Matrix *target, int64_t n, int64_t C, int64_t most, int64_t *classes,
                                   double *shares) {
    const int64_t bytes = width(target->dtype);
    const char *at = (const char *)target->at + n * target->s0 * bytes;
    double q[BLOCK] __attribute__((aligned(CACHE_LINE)));
    int64_t found = 0;
    for (int64_t start = 0; start < C; start += BLOCK, at += BLOCK * target->s1 * bytes) {
        const int64_t length = start + BLOCK < C ? BLOCK : C - start;
        const int64_t known = target->s1 == 1 ? length * bytes : 0;
        char any = known == 0;
        _Pragma("omp simd reduction(| : any)")
        for (int64_t i = 0; i < known; i++) any |= at[i]; /* most are 0 */
        if (!any) continue;
        VARIANT(load_double)(at, target->dtype, target->s1, q, length);
        for (int64_t j = 0; j < length; j++) {
            if (q[j] == 0) continue;
            if (found == most) return most + 1;
            classes[found] = start + j, shares[found++] = q[j];
        }
    }
    return found;
}

/* Loops over an adjusted row x = T + v in a scratch, which -inf fills up to whole LANES. */
#define ADJUSTED(A)                                                                                     \
    INLINE double VARIANT(sum_of_##A)(lanes_##A *lanes) {                                               \
        double eight[8], four[4];                                                                       \
        for (int i = 0; i < 8; i++) eight[i] = (double)(*lanes)[i] + (*lanes)[i + 8];                   \
        for (int i = 0; i < 4; i++) four[i] = eight[i] + eight[i + 4];                                  \
        return (four[0] + four[2]) + (four[1] + four[3]);                                               \
    }                                                                                                   \
    INLINE double VARIANT(below_##A)(const A *x, A max, int64_t C) {                                    \
        double sum = 0.0;                                                                               \
        _Pragma("omp simd reduction(+ : sum)")                                                          \
        for (int64_t j = 0; j < C; j++) sum += x[j] - max;                                              \
        return sum;                                                                                     \
    }                                                                                                   \
    /* The sum of r (x - max) over the classes that count. */                                           \
    INLINE double VARIANT(dot_##A)(const A *x, A max, const A *r, int64_t C) {                          \
        double sum = 0.0;                                                                               \
        _Pragma("omp simd reduction(+ : sum)")                                                          \
        for (int64_t j = 0; j < C; j++) sum += r[j] == 0 ? 0 : r[j] * (x[j] - max);                     \
        return sum;                                                                                     \
    }                                                                                                   \
    /* Replaces x by exp(x - max) and adds them up. Few terms are added in one number of type A, as a   \
     * thousand times 1 + 1e-8 is still 1 in float. Apart, as the loops of a large function are short of\
     * registers. */                                                                                    \
    static NOINLINE double VARIANT(exponentials_##A)(A *x, A max, int64_t C) {                          \
        double total = 0.0;                                                                             \
        for (int64_t start = 0; start < C; start += 64 * LANES) {                                       \
            lanes_##A lanes = {0};                                                                      \
            const int64_t end = start + 64 * LANES < C ? start + 64 * LANES : C;                        \
            for (int64_t i = start; i < end; i += LANES) {                                              \
                _Pragma("omp simd")                                                                     \
                for (int64_t j = i; j < i + LANES; j++) x[j] = VARIANT(exp_##A)(x[j] - max);            \
                ADD_LANES(lanes, x + i, A);                                                             \
            }                                                                                           \
            total += VARIANT(sum_of_##A)(&lanes);                                                       \
        }                                                                                               \
        return total;                                                                                   \
    }
ADJUSTED(float)
ADJUSTED(double)

#define STORAGE(NAME, V, A)                                                                             \
    INLINE A VARIANT(adjust_##NAME)(const V *v, int64_t stride, const A *table, A *restrict x, int64_t C,\
                                    int32_t *wrong) {                                                   \
        A max = -INFINITY;                                                                              \
        int32_t any = 0;                                                                                \
        _Pragma("omp simd reduction(max : max) reduction(| : any)")                                     \
        for (int64_t j = 0; j < C; j++) {                                                               \
            const A value = VARIANT(from_##NAME)(v[j * stride]) + table[j];                             \
            x[j] = value;                                                                               \
            any |= !(value < (A)INFINITY);                                                              \
            max = value > max ? value : max;                                                            \
        }                                                                                               \
        for (int64_t j = C; j % LANES; j++) x[j] = -INFINITY;                                           \
        *wrong = any;                                                                                   \
        return max;                                                                                     \
    }                                                                                                   \
    /* Writes x = T + v; gives its maximum, and whether a NaN or +inf is in it. */                      \
    static NOINLINE A VARIANT(adjusted_##NAME)(const V *v, int64_t stride, const A *table, A *restrict x,\
                                               int64_t C, int32_t *wrong) {                             \
        return stride == 1 ? VARIANT(adjust_##NAME)(v, 1, table, x, C, wrong)                           \
                           : VARIANT(adjust_##NAME)(v, stride, table, x, C, wrong);                     \
    }                                                                                                   \
    /* gradient = factor exp(x - max) - shift, or shift pull where that is given; the gradient may lie over\
     * the logits. */                                                                                   \
    INLINE void VARIANT(write_##NAME)(V *gradient, int64_t to, const V *v, int64_t stride, const A *table,\
                                      A max, A factor, A shift, const A *pull, int64_t C) {             \
        _Pragma("omp simd")                                                                             \
        for (int64_t j = 0; j < C; j++) {                                                               \
            const A e = VARIANT(exp_##A)(VARIANT(from_##NAME)(v[j * stride]) + table[j] - max);         \
            gradient[j * to] = VARIANT(to_##NAME)(factor * e - (pull ? shift * pull[j] : shift));       \
        }                                                                                               \
    }                                                                                                   \
    /* The same from exponentials that were kept. */                                                    \
    INLINE void VARIANT(scale_##NAME)(V *gradient, int64_t to, const A *restrict kept, A factor, A shift,\
                                      const A *restrict pull, int64_t C) {                              \
        _Pragma("omp simd")                                                                             \
        for (int64_t j = 0; j < C; j++)                                                                 \
            gradient[j * to] = VARIANT(to_##NAME)(factor * kept[j] - (pull ? shift * pull[j] : shift)); \
    }                                                                                                   \
    /* The gradient of a row, from its exponentials if they are kept, else from its logits. */          \
    static NOINLINE void VARIANT(derive_##NAME)(V *gradient, const Expert *of, const A *kept, const V *v,\
                                                const A *table, A max, A factor, A shift, const A *pull,\
                                                int64_t C) {                                            \
        if (kept && of->gc == 1)                                                                        \
            VARIANT(scale_##NAME)(gradient, 1, kept, factor, shift, pull, C);                           \
        else if (kept)                                                                                  \
            VARIANT(scale_##NAME)(gradient, of->gc, kept, factor, shift, pull, C);                      \
        else if (of->vc == 1 && of->gc == 1)                                                            \
            VARIANT(write_##NAME)(gradient, 1, v, 1, table, max, factor, shift, pull, C);               \
        else                                                                                            \
            VARIANT(write_##NAME)(gradient, of->gc, v, of->vc, table, max, factor, shift, pull, C);     \
    }                                                                                                   \
    static void VARIANT(clear_##NAME)(V *gradient, int64_t to, int64_t C) {                             \
        for (int64_t j = 0; j < C; j++) gradient[j * to] = 0;                                           \
    }                                                                                                   \
                                                                                                        \
    /* Rows whose loss is that of one class, expert by expert. */                                       \
    static void VARIANT(plain_##NAME)(const Call *call, int64_t begin, int64_t end, A *scratch) {       \
        const Batch *b = call->batch;                                                                   \
        const double e = b->smoothing;                                                                  \
        const int64_t C = b->C;                                                                         \
        A *table = scratch, *x = table + call->pitch;                                                   \
        int64_t expert = -1, k = b->N ? begin / b->N : 0, n = begin - k * b->N;                         \
        for (int64_t row = begin; row < end; row++, n++) {                                              \
            if (n == b->N) n = 0, k++;                                                                  \
            const int64_t nk = n * b->K + k;                                                            \
            const int64_t y = ((const int64_t *)b->target.at)[n * b->target.s0];                        \
            const Expert *of = call->experts + k;                                                       \
            const V *v = (const V *)of->logits + n * of->vn;                                            \
            V *gradient = of->gradient ? (V *)of->gradient + n * of->gn : NULL;                         \
            A *state = (A *)b->state + 2 * nk;                                                          \
                                                                                                        \
            if (y == b->ignore_index || y < 0 || y >= C) {                                              \
                if (b->result)                                                                          \
                    call->losses[nk] = y == b->ignore_index ? 0 : NAN, state[0] = 0, state[1] = 1;      \
                if (gradient) VARIANT(clear_##NAME)(gradient, of->gc, C);                               \
                continue;                                                                               \
            }                                                                                           \
            if (k != expert) {                                                                          \
                VARIANT(table_##A)(b, k, table);                                                        \
                expert = k;                                                                             \
            }                                                                                           \
            const A without_margin = table[y];                                                          \
            if (b->margin.at) table[y] -= (A)VARIANT(entry)(&b->margin, y);                             \
                                                                                                        \
            const double share = b->class_weight.at ? VARIANT(entry)(&b->class_weight, y) : 1.0;        \
            const double weight = VARIANT(weight)(b, n, k);                                             \
            const A own = VARIANT(from_##NAME)(v[y * of->vc]) + table[y];                               \
            A max;                                                                                      \
            double sum, scale, slope = 1.0;                                                             \
            if (!b->result) {                                                                           \
                max = state[0], sum = state[1];                                                         \
                scale = weight * (A)VARIANT(entry)(&b->upstream, n);                                    \
            } else {                                                                                    \
                int32_t wrong;                                                                          \
                max = VARIANT(adjusted_##NAME)(v, of->vc, table, x, C, &wrong);                         \
                const double below = e > 0 ? VARIANT(below_##A)(x, max, C) : 0;                         \
                sum = VARIANT(exponentials_##A)(x, max, C);                                             \
                if (wrong) sum = NAN;                                                                   \
                const double log_sum = log(sum);                                                        \
                double value = (1 - e) * (log_sum - ((double)own - max));                               \
                if (e > 0) value += e * (log_sum - below / C);                                          \
                if (b->gamma != 0) value *= VARIANT(focus)(value, b->gamma, &slope);                    \
                if (share == 0 && value == INFINITY) value = 0;                                         \
                call->losses[nk] = (A)(weight * share * value);                                         \
                state[0] = max, state[1] = (A)sum;                                                      \
                scale = weight * (A)(1 / call->divisor), sum = (A)sum; /* as backward would have them */\
            }                                                                                           \
            if (gradient) {                                                                             \
                scale *= share;                                                                         \
                if (b->gamma != 0) {                                                                    \
                    VARIANT(focus)(log(sum) - ((double)own - max), b->gamma, &slope);                   \
                    scale *= slope;                                                                     \
                }                                                                                       \
                const A factor = (A)(scale / sum), shift = (A)(scale * e / C);                          \
                VARIANT(derive_##NAME)(gradient, of, b->result ? x : NULL, v, table, max, factor, shift, NULL, C);\
                const double p = (b->result ? x[y] : VARIANT(exp_##A)(own - max)) / sum;                \
                gradient[y * of->gc] = VARIANT(to_##NAME)((A)(scale * (p - (1 - e) - e / C)));          \
            }                                                                                           \
            table[y] = without_margin;                                                                  \
        }                                                                                               \
    }                                                                                                   \
                                                                                                        \
    /* Rows whose loss is a sum over classes, sample by sample. */                                      \
    static void VARIANT(mixed_##NAME)(const Call *call, int64_t begin, int64_t end, A *scratch) {       \
        const Batch *b = call->batch;                                                                   \
        const int64_t C = b->C, pitch = call->pitch;                                                    \
        A *x = scratch, *q = x + pitch, *given = q + pitch, *slopes = given + pitch;                    \
        A *class_weight = slopes + pitch, *margin = class_weight + pitch, *with_margin = margin + pitch;\
        A *tables = with_margin + pitch, *r = b->class_weight.at || b->smoothing > 0 ? given : q;       \
        VARIANT(vector_##A)(&b->class_weight, 1, class_weight, C);                                      \
        VARIANT(vector_##A)(&b->margin, 0, margin, C);                                                  \
        for (int64_t k = 0; k < b->K; k++) VARIANT(table_##A)(b, k, tables + k * pitch);                \
                                                                                                        \
        /* Where few classes count, as in mixup, they alone are looked at. */                           \
        const int may_be_few = b->target.dtype != INDEX && b->smoothing == 0 && b->gamma == 0 && !b->margin.at;\
        int64_t sample = -1, n = b->K ? begin / b->K : 0, k = begin - n * b->K, classes[FEW];           \
        double mass = 0.0, shares[FEW];                                                                 \
        int64_t few = 0;                                                                                \
        int any = 0, is_few = 0;                                                                        \
        A adjusted[FEW];                                                                                \
        for (int64_t row = begin; row < end; row++, k++) {                                              \
            if (k == b->K) n++, k = 0;                                                                  \
            const Expert *of = call->experts + k;                                                       \
            const V *v = (const V *)of->logits + n * of->vn;                                            \
            V *gradient = of->gradient ? (V *)of->gradient + n * of->gn : NULL;                         \
            A *state = (A *)b->state + 2 * row;                                                         \
            const A *table = tables + k * pitch, *pull = r;                                             \
            if (n != sample) {                                                                          \
                sample = n;                                                                             \
                few = may_be_few ? VARIANT(classes_of)(&b->target, n, C, FEW, classes, shares) : FEW + 1;\
                is_few = few <= FEW;                                                                    \
                if (is_few) any = few > 0, mass = 0.0;                                                  \
                else any = VARIANT(shares_##A)(b, n, class_weight, q, r, &mass), few = 0;               \
                for (int64_t i = 0; i < few; i++) mass += shares[i] = (A)(shares[i] * class_weight[classes[i]]);\
            }                                                                                           \
            if (!any) {                                                                                 \
                if (b->result) call->losses[row] = 0, state[0] = 0, state[1] = 1;                       \
                if (gradient) VARIANT(clear_##NAME)(gradient, of->gc, C);                               \
                continue;                                                                               \
            }                                                                                           \
            if (b->margin.at) {                                                                         \
                for (int64_t j = 0; j < C; j++) with_margin[j] = table[j] - (q[j] == 0 ? 0 : margin[j] * q[j]);\
                table = with_margin;                                                                    \
            }                                                                                           \
                                                                                                        \
            for (int64_t i = 0; i < few; i++)                                                           \
                adjusted[i] = VARIANT(from_##NAME)(v[classes[i] * of->vc]) + table[classes[i]];         \
                                                                                                        \
            const double weight = VARIANT(weight)(b, n, k);                                             \
            A max;                                                                                      \
            double sum, scale, pulled = mass;                                                           \
            if (!b->result) {                                                                           \
                max = state[0], sum = state[1];                                                         \
                scale = weight * (A)VARIANT(entry)(&b->upstream, n);                                    \
            } else {                                                                                    \
                int32_t wrong;                                                                          \
                double below = 0.0;                                                                     \
                max = VARIANT(adjusted_##NAME)(v, of->vc, table, x, C, &wrong);                         \
                if (!is_few) below = VARIANT(dot_##A)(x, max, r, C);                                    \
                for (int64_t i = 0; i < few; i++) below += shares[i] == 0 ? 0 : shares[i] * (adjusted[i] - max);\
                sum = VARIANT(exponentials_##A)(x, max, C);                                             \
                if (wrong) sum = NAN;                                                                   \
                call->losses[row] = (A)(weight * (mass * log(sum) - below));                            \
                state[0] = max, state[1] = (A)sum;                                                      \
                scale = weight * (A)(1 / call->divisor);                                                \
            }                                                                                           \
            if (b->gamma != 0) {                                                                        \
                double value = 0.0, slope;                                                              \
                pulled = 0.0;                                                                           \
                for (int64_t j = 0; j < C; j++) {                                                       \
                    slopes[j] = 0;                                                                      \
                    if (r[j] == 0) continue;                                                            \
                    const A own = VARIANT(from_##NAME)(v[j * of->vc]) + table[j];                       \
                    const double entropy = log(sum) - ((double)own - max);                              \
                    value += r[j] * entropy * VARIANT(focus)(entropy, b->gamma, &slope);                \
                    slopes[j] = (A)(r[j] * slope);                                                      \
                    pulled += slopes[j];                                                                \
                }                                                                                       \
                if (b->result) call->losses[row] = (A)(weight * value);                                 \
                pull = slopes;                                                                          \
            }                                                                                           \
            if (!gradient) continue;                                                                    \
                                                                                                        \
            const A factor = (A)(scale * pulled / (A)sum), shift = is_few ? 0 : (A)scale;               \
            if (is_few) pull = NULL;                                                                    \
            VARIANT(derive_##NAME)(gradient, of, b->result ? x : NULL, v, table, max, factor, shift, pull, C);\
            for (int64_t i = 0; i < few; i++) {                                                         \
                const int64_t j = classes[i];                                                           \
                const A e = b->result ? x[j] : VARIANT(exp_##A)(adjusted[i] - max);                     \
                gradient[j * of->gc] = VARIANT(to_##NAME)(factor * e - (A)scale * (A)shares[i]);        \
            }                                                                                           \
        }                                                                                               \
    }
STORAGE(f64, double, double)
STORAGE(f32, float, float)
STORAGE(bf16, uint16_t, float)
STORAGE(f16, uint16_t, float)
#undef STORAGE
#undef bits32
#undef float32
#undef bits64
#undef float64

#undef LOAD
#undef LOADS
#undef CONSTANTS
#undef SHARES
#undef ADJUSTED

static void VARIANT(rows)(const Call *call, int64_t begin, int64_t end, void *scratch) {
    switch (2 * call->batch->dtype + call->mixed) {
    case 2 * F64: VARIANT(plain_f64)(call, begin, end, scratch); break;
    case 2 * F32: VARIANT(plain_f32)(call, begin, end, scratch); break;
    case 2 * BF16: VARIANT(plain_bf16)(call, begin, end, scratch); break;
    case 2 * F16: VARIANT(plain_f16)(call, begin, end, scratch); break;
    case 2 * F64 + 1: VARIANT(mixed_f64)(call, begin, end, scratch); break;
    case 2 * F32 + 1: VARIANT(mixed_f32)(call, begin, end, scratch); break;
    case 2 * BF16 + 1: VARIANT(mixed_bf16)(call, begin, end, scratch); break;
    default: VARIANT(mixed_f16)(call, begin, end, scratch);
    }
}

/* The cosine of the angle between two vectors of length d, 0 where one is of zeros. */
static double VARIANT(cosine)(const char *f, int64_t f_dtype, int64_t f_stride, const char *w, int64_t w_dtype,
                              int64_t w_stride, int64_t d) {
    double a[BLOCK] __attribute__((aligned(CACHE_LINE))), b[BLOCK] __attribute__((aligned(CACHE_LINE)));
    double ab = 0.0, aa = 0.0, bb = 0.0;
    for (int64_t start = 0; start < d; start += BLOCK) {
        const int64_t length = start + BLOCK < d ? BLOCK : d - start;
        VARIANT(load_double)(f + start * f_stride * width(f_dtype), f_dtype, f_stride, a, length);
        VARIANT(load_double)(w + start * w_stride * width(w_dtype), w_dtype, w_stride, b, length);
        _Pragma("omp simd reduction(+ : ab, aa, bb)")
        for (int64_t j = 0; j < length; j++) {
            ab += a[j] * b[j];
            aa += a[j] * a[j];
            bb += b[j] * b[j];
        }
    }
    return aa == 0 || bb == 0 ? 0 : ab / (sqrt(aa) * sqrt(bb));
}
