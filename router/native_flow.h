/* The max-flow of a placement: see placement/flow.py.
 *
 * Vertices: 2i where unit i takes a token in, 2i+1 where it hands it on, then source and sink. A
 * placement's graph has no cycle (each hop ends at a later layer), so the first pass is one blocking
 * flow along the edges as they are, whatever the number of hops; that is nearly all of it. Dinic's
 * phases on the residual graph find the rest and prove that there is no more.
 */

#define FLOW_EPS 1e-9 /* tokens a second; capacities are at most some ten thousands */

typedef struct {
    int64_t units, layers, width;
    const int32_t *most;       /* [units]: most layers that it holds */
    const double *speed;       /* [units][width]: tokens a second through k held layers */
    const double *link;        /* [units + 1][units + 1]: sender, receiver; the last is the coordinator */
    const double *nic_in;      /* [units]: of activations */
    const double *nic_out;
    double limit;              /* of all that the coordinator sends and receives */
} Placing;

typedef struct {
    const Placing *p;
    int32_t source, sink, edges;
    int32_t *head, *arc, *level, *queue; /* [vertices] */
    int32_t *to, *next;                  /* [edges]: e and e ^ 1 are the two directions */
    double *left;                        /* [edges]: capacity that is left */
    int32_t forward;                     /* the first pass: only edges as they are */
    int32_t *by_first, *from_first;      /* units in the order of their first layers; where each begins */
} Net;

static void flow_release(Net *g) {
    free(g->head), free(g->arc), free(g->level), free(g->queue);
    free(g->to), free(g->next), free(g->left), free(g->by_first), free(g->from_first);
}

static int flow_prepare(Net *g, const Placing *p) {
    size_t n = (size_t)p->units, vertices = 2 * n + 2, edges = 2 * (n * n + 3 * n);
    g->p = p;
    g->source = (int32_t)(2 * n), g->sink = (int32_t)(2 * n + 1);
    g->head = malloc(vertices * sizeof *g->head), g->arc = malloc(vertices * sizeof *g->arc);
    g->level = malloc(vertices * sizeof *g->level), g->queue = malloc(vertices * sizeof *g->queue);
    g->to = malloc((edges + 2) * sizeof *g->to), g->next = malloc((edges + 2) * sizeof *g->next);
    g->left = malloc((edges + 2) * sizeof *g->left);
    g->by_first = malloc((n + 1) * sizeof *g->by_first);
    g->from_first = malloc(((size_t)p->layers + 2) * sizeof *g->from_first);
    return g->head && g->arc && g->level && g->queue && g->to && g->next && g->left &&
           g->by_first && g->from_first;
}

static void flow_edge(Net *g, int32_t a, int32_t b, double capacity) {
    int32_t e = g->edges;
    g->to[e] = b, g->left[e] = capacity, g->next[e] = g->head[a], g->head[a] = e;
    g->to[e + 1] = a, g->left[e + 1] = 0, g->next[e + 1] = g->head[b], g->head[b] = e + 1;
    g->edges = e + 2;
}

/* What unit i passes when it holds these layers: its speed, and its connection where it bears all. */
static double flow_passes(const Placing *p, int32_t i, int32_t first, int32_t end) {
    double most = p->speed[(int64_t)i * p->width + end - first];
    if (first > 0 && p->nic_in[i] < most) most = p->nic_in[i];
    if (end < p->layers && p->nic_out[i] < most) most = p->nic_out[i];
    return most;
}

/* Edges of a placement; a unit with first == end idles. What ends at b enters whoever begins at or
 * before b and ends after it; `reach` back from b is the longest that anybody holds. */
static void flow_build(Net *g, const int32_t *first, const int32_t *end) {
    const Placing *p = g->p;
    int32_t n = (int32_t)p->units, layers = (int32_t)p->layers, reach = (int32_t)p->width;
    int64_t row = n + 1;
    g->edges = 0;
    for (int32_t v = 0; v < 2 * n + 2; v++) g->head[v] = -1;
    memset(g->from_first, 0, ((size_t)layers + 2) * sizeof *g->from_first);
    for (int32_t i = 0; i < n; i++)
        if (end[i] > first[i]) g->from_first[first[i] + 1]++;
    for (int32_t l = 0; l < layers; l++) g->from_first[l + 1] += g->from_first[l];
    for (int32_t i = 0; i < n; i++)
        if (end[i] > first[i]) g->by_first[g->from_first[first[i]]++] = i;
    for (int32_t l = layers; l > 0; l--) g->from_first[l] = g->from_first[l - 1];
    g->from_first[0] = 0;
    for (int32_t i = 0; i < n; i++) {
        if (end[i] <= first[i]) continue;
        double most = flow_passes(p, i, first[i], end[i]);
        int32_t b = end[i], oldest = b - reach > 0 ? b - reach : 0;
        flow_edge(g, 2 * i, 2 * i + 1, most);
        if (first[i] == 0) flow_edge(g, g->source, 2 * i, fmin(most, p->link[n * row + i]));
        if (b == layers) {
            flow_edge(g, 2 * i + 1, g->sink, fmin(most, p->link[i * row + n]));
            continue;
        }
        for (int32_t at = g->from_first[oldest]; at < g->from_first[b + 1]; at++) {
            int32_t j = g->by_first[at];
            double link = p->link[i * row + j];
            if (end[j] > b && link > FLOW_EPS) flow_edge(g, 2 * i + 1, 2 * j, fmin(most, link));
        }
    }
}

/* Sends up to `amount` from v to the sink along admissible edges; how much arrived. */
static double flow_push(Net *g, int32_t v, double amount) {
    double sent = 0;
    if (v == g->sink) return amount;
    for (; g->arc[v] >= 0; g->arc[v] = g->next[g->arc[v]]) {
        int32_t e = g->arc[v], to = g->to[e];
        if (g->left[e] <= FLOW_EPS) continue;
        if (g->forward ? e & 1 : g->level[to] != g->level[v] + 1) continue;
        double got = flow_push(g, to, fmin(amount - sent, g->left[e]));
        if (got <= 0) continue;
        g->left[e] -= got, g->left[e ^ 1] += got;
        sent += got;
        if (amount - sent <= FLOW_EPS) return sent;
    }
    return sent;
}

/* Hops from the source in the residual graph; whether the sink is reached. */
static int flow_levels(Net *g) {
    int32_t vertices = (int32_t)(2 * g->p->units + 2), read = 0, write = 0;
    for (int32_t v = 0; v < vertices; v++) g->level[v] = -1;
    g->level[g->source] = 0, g->queue[write++] = g->source;
    while (read < write) {
        int32_t v = g->queue[read++];
        for (int32_t e = g->head[v]; e >= 0; e = g->next[e])
            if (g->left[e] > FLOW_EPS && g->level[g->to[e]] < 0) {
                g->level[g->to[e]] = g->level[v] + 1;
                if (g->to[e] == g->sink) return 1;
                g->queue[write++] = g->to[e];
            }
    }
    return 0;
}

/* Tokens a second that this placement passes; the flow of each edge stays in g->left[e ^ 1]. */
static double flow_value(Net *g, const int32_t *first, const int32_t *end) {
    size_t vertices = (size_t)(2 * g->p->units + 2);
    double limit = g->p->limit, total = 0;
    flow_build(g, first, end);
    memcpy(g->arc, g->head, vertices * sizeof *g->arc);
    g->forward = 1;
    total = flow_push(g, g->source, limit);
    g->forward = 0;
    while (limit - total > FLOW_EPS && flow_levels(g)) {
        memcpy(g->arc, g->head, vertices * sizeof *g->arc);
        double more = flow_push(g, g->source, limit - total);
        if (more <= FLOW_EPS) break;
        total += more;
    }
    return total;
}
