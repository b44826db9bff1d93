/* Expected latency of a placement at a load: see placement/latency.py, which tells the model and has
 * the same in numpy.
 *
 * Units are sorted by the ends of their spans: every hop ends at a later layer, so the matrix of hops
 * is triangular, and the sums over all paths are one substitution.
 */

typedef struct {
    int64_t units, layers, rows, width;
    const double *one_way; /* [units + 1][units + 1]: seconds; the last is the coordinator */
    const double *token_s; /* [units + 1][units + 1]: of one token's activations on the line */
    const double *id_s;    /* [units + 1][units + 1]: of one token id */
    const double *decode;  /* [units][rows + 2]: seconds of a layer for so many rows */
    const double *chunk;   /* [units]: of a layer for a chunk */
    const double *room;    /* [units][width]: tokens of KV beside k layers */
    double requests_per_s, output_tokens, chunk_tokens, chunks, long_chunks, context, variance;
    double spread, full, convoy;
    int64_t rounds;
} Serving;

typedef struct { /* what is expected */
    double ttft_s, long_ttft_s, tpot_s, stages, busiest, kv;
} Expected;

typedef struct {
    const Serving *s;
    int32_t n, tail, *at, *first, *end; /* the used units, by the end of their spans; first tail */
    double *rows, *share, *length, *heads, *wait, *token, *layer_chunk, *queue, *prompts, *step, *alike; /* [n] */
    double *cost, *hops, *paths, *edges, *ring, *ends, *back; /* [n][n] */
} Mean;

static void mean_release(Mean *m) {
    free(m->at), free(m->first), free(m->end);
    free(m->rows), free(m->cost);
}

static int mean_prepare(Mean *m, const Serving *s) {
    size_t n = (size_t)s->units + 1;
    memset(m, 0, sizeof *m);
    m->s = s;
    m->at = malloc(n * sizeof *m->at), m->first = malloc(n * sizeof *m->first);
    m->end = malloc(n * sizeof *m->end);
    m->rows = malloc(11 * n * sizeof *m->rows), m->cost = malloc(7 * n * n * sizeof *m->cost);
    if (!m->at || !m->first || !m->end || !m->rows || !m->cost) return 0;
    double **lists[] = {&m->share, &m->length, &m->heads, &m->wait, &m->token,
                        &m->layer_chunk, &m->queue, &m->prompts, &m->step, &m->alike};
    double **tables[] = {&m->hops, &m->paths, &m->edges, &m->ring, &m->ends, &m->back};
    for (size_t k = 0; k < 10; k++) *lists[k] = m->rows + (k + 1) * n;
    for (size_t k = 0; k < 6; k++) *tables[k] = m->cost + (k + 1) * n * n;
    return 1;
}

static double mean_decode(const Serving *s, int32_t unit, double rows) {
    const double *row = s->decode + (int64_t)unit * (s->rows + 2);
    int64_t low = rows < (double)s->rows ? (int64_t)rows : s->rows;
    return row[low] + (row[low + 1] - row[low]) * (rows - (double)low);
}

static double mean_queue(const Serving *s, double used, double work) {
    double below = fmin(used, s->full);
    double wait = below / (1 - below) * (1 + 20 * fmax(used - s->full, 0));
    return wait * work * (1 + s->variance) / 2;
}

static int mean_load(Mean *m, const int32_t *first, const int32_t *end) { /* 0: it serves nothing */
    const Serving *s = m->s;
    int begins = 0, finishes = 0;
    double held = 0;
    m->n = 0;
    for (int32_t i = 0; i < s->units; i++) {
        if (end[i] <= first[i]) continue;
        int32_t k = m->n++;
        for (; k > 0 && m->end[k - 1] > end[i]; k--)
            m->at[k] = m->at[k - 1], m->first[k] = m->first[k - 1], m->end[k] = m->end[k - 1];
        m->at[k] = i, m->first[k] = first[i], m->end[k] = end[i];
        begins |= first[i] == 0, finishes |= end[i] == s->layers;
        held += end[i] - first[i];
    }
    for (m->tail = m->n; m->tail > 0 && m->end[m->tail - 1] == s->layers;) m->tail--;
    for (int32_t i = 0; i < m->n; i++) {
        m->rows[i] = 1, m->length[i] = m->end[i] - m->first[i];
        m->share[i] = (double)s->layers / held, m->alike[i] = 0;
    }
    memset(m->edges, 0, (size_t)m->n * (size_t)m->n * sizeof *m->edges);
    return begins && finishes;
}

/* What steps take when each unit is visited by its share of the requests. */
static void mean_times(Mean *m) {
    const Serving *s = m->s;
    for (int32_t i = 0; i < m->n; i++) {
        double visits = s->requests_per_s * m->share[i], length = m->length[i];
        double rate = visits * s->output_tokens, chunks = visits * s->chunks;
        double prefill = s->chunk[m->at[i]], rows = 0, step = 0;
        double part = fmin(chunks * length * prefill, s->full);
        for (int k = 0; k < 2; k++) {
            rows = mean_decode(s, m->at[i], m->rows[i]);
            step = length * rows / (1 - part);
            m->rows[i] = fmax(fmin(0.5 * (m->rows[i] + rate * step), 1e4), 1);
        }
        double beside = fmin(chunks * step, 1), brief = length * rows;
        double lasting = length * (rows + prefill), mean = brief + beside * (lasting - brief);
        double left = ((1 - beside) * brief * brief + beside * lasting * lasting) / (2 * mean);
        double flowing = rate * mean, busy = flowing / (flowing + exp(-fmin(flowing, 50)));
        busy *= 1 - m->alike[i];
        m->step[i] = mean;
        m->wait[i] = busy * left;
        m->token[i] = rows + beside * prefill;
        m->layer_chunk[i] = rows * busy + prefill;
        m->prompts[i] = chunks * length * m->layer_chunk[i];
        m->queue[i] = mean_queue(s, m->prompts[i], s->chunks * length * m->layer_chunk[i]);
    }
}

static int64_t mean_pair(const Mean *m, int32_t i, int32_t j) {
    return (int64_t)m->at[i] * (m->s->units + 1) + m->at[j];
}

static double mean_onward(const Mean *m, int32_t i, int32_t j) { /* of a token, i left to j left */
    int64_t pair = mean_pair(m, i, j);
    return m->wait[j] + (m->end[j] - m->end[i]) * m->token[j] + m->s->one_way[pair] + m->s->token_s[pair];
}

static double mean_carry(const Mean *m, int32_t i, int32_t j) { /* a chunk on the line */
    return m->s->chunk_tokens * m->s->token_s[mean_pair(m, i, j)];
}

static double mean_line(const Mean *m, int32_t i, int32_t j, double *used) { /* chunks waited for */
    const Serving *s = m->s;
    *used = s->requests_per_s * m->edges[i * m->n + j] * s->chunks * mean_carry(m, i, j);
    return mean_queue(s, *used, s->chunks);
}

static double mean_first(const Mean *m, int32_t i, int32_t j) { /* the same of a prompt's first chunk */
    double used, waits = mean_line(m, i, j, &used);
    double stage = m->wait[j] + (m->end[j] - m->end[i]) * m->layer_chunk[j];
    return stage + m->s->one_way[mean_pair(m, i, j)] + mean_carry(m, i, j) * (1 + waits);
}

static int mean_enters(const Mean *m, int32_t i, int32_t j) {
    return m->first[j] <= m->end[i] && m->end[i] < m->end[j];
}

static double mean_closing(const Mean *m, int32_t tail, int32_t head) {
    int64_t pair = mean_pair(m, tail, head);
    return m->s->one_way[pair] + m->s->id_s[pair];
}

static double mean_entry(const Mean *m, int32_t head) {
    return m->s->one_way[m->s->units * (m->s->units + 1) + m->at[head]];
}

static double mean_exit(const Mean *m, int32_t tail) {
    return m->s->one_way[(int64_t)m->at[tail] * (m->s->units + 1) + m->s->units];
}

/* Weights of all paths and of all rings at this temperature; their sum. */
static double mean_paths(Mean *m, double heat) {
    int32_t n = m->n;
    double total = 0, out = m->s->output_tokens;
    for (int32_t i = 0; i < n; i++)
        for (int32_t j = i + 1; j < n; j++)
            m->hops[i * n + j] = mean_enters(m, i, j) ? exp(-m->cost[i * n + j] / heat) : 0;
    memset(m->paths, 0, (size_t)n * (size_t)n * sizeof *m->paths);
    for (int32_t i = 0; i < n; i++) {
        double *row = m->paths + i * n;
        row[i] = 1;
        for (int32_t k = i; k < n; k++) {
            if (row[k] == 0) continue;
            const double *hop = m->hops + k * n;
            for (int32_t j = k + 1; j < n; j++) row[j] += row[k] * hop[j];
        }
    }
    for (int32_t t = m->tail; t < n; t++)
        for (int32_t h = 0; h < n; h++) {
            double *end = m->ends + t * n + h;
            *end = 0;
            if (m->first[h] != 0) continue;
            double begin = m->wait[h] * (out + 1) + mean_entry(m, h) +
                           m->end[h] * (m->token[h] * out + m->layer_chunk[h]);
            *end = exp(-(out * mean_closing(m, t, h) + mean_exit(m, t) + begin) / heat);
            total += *end * m->paths[h * n + t];
        }
    return total;
}

/* New shares of edges, heads and rings, averaged with those of the rounds before. */
static void mean_share(Mean *m, double total, double keep) {
    int32_t n = m->n;
    memset(m->back, 0, (size_t)n * (size_t)n * sizeof *m->back);
    for (int32_t t = m->tail; t < n; t++)
        for (int32_t h = 0; h < n; h++) {
            double end = m->ends[t * n + h];
            for (int32_t i = h; end > 0 && i < n; i++) m->back[t * n + i] += end * m->paths[h * n + i];
        }
    for (int32_t i = 0; i < n; i++)
        for (int32_t j = i + 1; j < n; j++) {
            double through = 0, hop = m->hops[i * n + j];
            for (int32_t t = j > m->tail ? j : m->tail; hop > 0 && t < n; t++)
                through += m->paths[j * n + t] * m->back[t * n + i];
            m->edges[i * n + j] = keep * m->edges[i * n + j] + (1 - keep) * hop * through / total;
        }
    for (int32_t h = 0; h < n; h++) {
        double sum = 0;
        for (int32_t t = m->tail; t < n; t++) {
            double now = m->ends[t * n + h] * m->paths[h * n + t] / total, *held = m->ring + t * n + h;
            *held = keep > 0 ? keep * *held + (1 - keep) * now : now;
            sum += *held;
        }
        m->heads[h] = sum;
    }
}

static void mean_visits(Mean *m) { /* from shares of edges to visits and mean lengths */
    int32_t n = m->n;
    for (int32_t j = 0; j < n; j++) {
        double whole = m->end[j], share = m->heads[j], work = share * whole, squares = work * whole;
        for (int32_t i = 0; i < j; i++) {
            double edge = m->edges[i * n + j], run = m->end[j] - m->end[i];
            share += edge, work += edge * run, squares += edge * run * run;
        }
        m->share[j] = share;
        m->length[j] = work > 0 ? squares / fmax(work, 1e-12) : m->end[j] - m->first[j];
        m->alike[j] = 0; /* how much its rows come in one convoy that is not faster than itself */
        for (int32_t i = 0; i < n; i++) {
            double part = (i < j ? m->edges[i * n + j] : 0) + (i >= m->tail ? m->ring[i * n + j] : 0);
            part /= fmax(share, 1e-12);
            m->alike[j] += m->s->convoy * part * part * fmin(m->step[i] / m->step[j], 1);
        }
    }
}

static int mean_choose(Mean *m, double keep) { /* 0: no ring at any temperature */
    const Serving *s = m->s;
    int32_t n = m->n;
    double held = 0, work = 0;
    for (int32_t i = 0; i < n; i++) {
        double length = m->end[i] - m->first[i];
        held += length, work += length * m->token[i];
        for (int32_t j = i + 1; j < n; j++)
            if (mean_enters(m, i, j))
                m->cost[i * n + j] = s->output_tokens * mean_onward(m, i, j) + mean_first(m, i, j);
    }
    double heat = s->spread * s->output_tokens * (double)s->layers * work / held;
    for (int k = 0; k < 4; k++, heat *= 2) {
        double total = mean_paths(m, heat);
        if (!(total > 1e-250)) continue;
        mean_share(m, total, keep);
        mean_visits(m);
        return 1;
    }
    return 0;
}

static double power16(double x) {
    x *= x, x *= x, x *= x;
    return x * x;
}

static void mean_tell(const Mean *m, Expected *e) {
    const Serving *s = m->s;
    int32_t n = m->n;
    double first = 0, tpot = 0, slow = 0, slow_long = 0, ways = 0;
    *e = (Expected){0};
    for (int32_t h = 0; h < n; h++) {
        double whole = m->end[h], part = m->heads[h];
        e->stages += m->share[h];
        if (m->share[h] > 1e-6) e->busiest = fmax(e->busiest, m->prompts[h]);
        for (int32_t t = m->tail; t < n; t++) {
            double ring = m->ring[t * n + h];
            if (ring > 0) ways += ring * mean_exit(m, t), tpot += ring * mean_closing(m, t, h);
        }
        if (!(part > 0)) continue;
        tpot += part * (m->wait[h] + whole * m->token[h]);
        first += part * (mean_entry(m, h) + m->wait[h] + whole * m->layer_chunk[h]);
        double chunk = whole * m->layer_chunk[h];
        slow += part * power16(fmax(s->chunks - 1, 0) * chunk + m->queue[h]);
        slow_long += part * power16(fmax(s->long_chunks - 1, 0) * chunk + m->queue[h]);
    }
    for (int32_t i = 0; i < n; i++)
        for (int32_t j = i + 1; j < n; j++) {
            double part = m->edges[i * n + j], used;
            if (!(part > 0)) continue;
            double waits = mean_line(m, i, j, &used), carry = mean_carry(m, i, j);
            double chunk = (m->end[j] - m->end[i]) * m->layer_chunk[j], later = fmax(s->chunks - 1, 0);
            double later_long = fmax(s->long_chunks - 1, 0);
            tpot += part * mean_onward(m, i, j), first += part * mean_first(m, i, j);
            slow += part * (power16(later * chunk + m->queue[j]) + power16(carry * (later + waits)));
            slow_long += part * (power16(later_long * chunk + m->queue[j]) +
                                 power16(carry * (later_long + waits)));
            e->busiest = fmax(e->busiest, used);
        }
    e->tpot_s = tpot;
    e->ttft_s = first + ways + pow(slow, 0.0625), e->long_ttft_s = first + ways + pow(slow_long, 0.0625);
    double alive = s->requests_per_s * (e->ttft_s + s->output_tokens * tpot);
    for (int32_t i = 0; i < n; i++) {
        double room = s->room[(int64_t)m->at[i] * s->width + m->end[i] - m->first[i]];
        e->kv = fmax(e->kv, alive * m->share[i] * s->context / room);
    }
}

static int mean_expect(Mean *m, const int32_t *first, const int32_t *end, Expected *e) {
    if (!mean_load(m, first, end)) return 0;
    for (int64_t round = 0; round < m->s->rounds; round++) {
        mean_times(m);
        if (!mean_choose(m, (double)round / (double)(round + 1))) return 0;
    }
    mean_tell(m, e);
    return 1;
}
