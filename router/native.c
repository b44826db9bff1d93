/* The hot path of the router: shortest rings under two limits, the choice of candidates, the flow of
 * placements and annealing on it.
 *
 * search.py and placement/{flow,anneal}.py tell the theory and have the same in Python, which tests
 * compare with this; the structs below are mirrored in native.py and placement/compiled.py. Nothing
 * here calls Python: plain arrays in, plain arrays out, so that the interpreter's lock need not be
 * held.
 */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#include "native_tables.h"
#include "native_boxes.h"
#include "native_search.h"
#include "native_select.h"
#include "native_flow.h"
#include "native_anneal.h"
#include "native_latency.h"

/* What all searches over the same peers, spans and ways have in common; NULL: no memory. Price,
 * weights and limits may differ from one search to the next, and nothing else. */
EXPORT void *hexswarm_prepare(const Problem *problem) {
    Search *search = calloc(1, sizeof *search);
    if (search && !prepare(search, problem)) {
        release(search);
        free(search);
        return NULL;
    }
    return search;
}

EXPORT void hexswarm_search(void *prepared, const Problem *problem, Answer *answer) {
    memset(answer, 0, sizeof *answer);
    answer->status = run(prepared, problem, answer);
}

EXPORT void hexswarm_release(void *prepared) {
    if (prepared) release(prepared);
    free(prepared);
}

EXPORT int64_t hexswarm_select(const Census *c) {
    int64_t n = c->peers, layers = c->layers, states = 0, ok = 0;
    int32_t *from = calloc((size_t)layers + 2, sizeof *from);
    int32_t *holders = NULL, *fill = NULL;
    double *come = malloc((size_t)(n + 1) * sizeof *come);
    double *forward = NULL, *now = NULL, *gate = NULL, *best = NULL;
    char *home = calloc((size_t)c->regions + 1, 1);
    if (!from || !come || !home) goto end;
    for (int64_t i = 0; i < n; i++) {
        come[i] = c->in[i] + c->enter[i];
        states += c->end[i] - c->first[i];
        for (int l = c->first[i]; l < c->end[i]; l++) from[l + 1]++;
        if (c->first[i] == 0) home[c->region[i]] = 1;
        c->score[i] = INFINITY;
        if (c->end[i] - c->first[i] == layers) /* alone, without a closing link */
            c->score[i] = c->begin[i] + c->enter[i] + layers * c->layer[i] + c->finish[i];
    }
    for (int64_t l = 0; l < layers; l++) from[l + 1] += from[l];
    holders = malloc((size_t)(states + 1) * sizeof *holders);
    fill = malloc((size_t)(layers + 1) * sizeof *fill);
    forward = malloc((size_t)(states + 1) * sizeof *forward);
    now = malloc((size_t)(n + 1) * sizeof *now);
    gate = malloc((size_t)(c->regions + 1) * sizeof *gate);
    best = malloc((size_t)(c->regions + 1) * sizeof *best);
    if (!holders || !fill || !forward || !now || !gate || !best) goto end;
    memcpy(fill, from, (size_t)layers * sizeof *fill);
    for (int64_t i = 0; i < n; i++)
        for (int l = c->first[i]; l < c->end[i]; l++) holders[fill[l]++] = (int32_t)i;
    for (int r = 0; r < c->regions; r++)
        if (home[r] && c->homes[r] && !c->anywhere)
            through(c, from, holders, come, forward, r, now, gate, best);
    if (c->anywhere) through(c, from, holders, come, forward, -1, now, gate, best);
    ok = 1;
end:
    free(from), free(come), free(holders), free(fill), free(forward), free(now), free(gate);
    free(best), free(home);
    return ok;
}

/* The graph of placements of the same units; `placing` and its arrays must outlive it. */
EXPORT void *hexswarm_flow_prepare(const Placing *placing) {
    Net *net = calloc(1, sizeof *net);
    if (net && !flow_prepare(net, placing)) {
        flow_release(net);
        free(net);
        return NULL;
    }
    return net;
}

EXPORT void hexswarm_flow_release(void *net) {
    if (net) flow_release(net);
    free(net);
}

/* -1: a unit holds more than fits, or layers that do not exist. */
EXPORT double hexswarm_flow_value(void *net, const int32_t *first, const int32_t *end) {
    const Placing *p = ((Net *)net)->p;
    for (int64_t i = 0; i < p->units; i++)
        if (first[i] < 0 || end[i] < first[i] || end[i] - first[i] > p->most[i] || end[i] > p->layers)
            return -1;
    return flow_value(net, first, end);
}

/* The edges of that placement that carry something; `units` stands for the coordinator. The arrays
 * have room for units * units + 2 * units. */
EXPORT int64_t hexswarm_flow_edges(void *prepared, const int32_t *first, const int32_t *end,
                                   int32_t *sender, int32_t *receiver, double *carried) {
    Net *net = prepared;
    int32_t n = (int32_t)net->p->units, count = 0;
    flow_value(net, first, end);
    for (int32_t e = 0; e < net->edges; e += 2) {
        int32_t from = net->to[e + 1], to = net->to[e];
        if (net->left[e + 1] <= FLOW_EPS || (from / 2 == to / 2 && from < 2 * n)) continue;
        sender[count] = from / 2, receiver[count] = to / 2, carried[count] = net->left[e + 1];
        count++;
    }
    return count;
}

/* See anneal_walk; 0: no memory. */
EXPORT int64_t hexswarm_anneal(void *net, Annealing *annealing, int32_t *first, int32_t *end,
                               int32_t *best_first, int32_t *best_end) {
    return anneal(net, annealing, first, end, best_first, best_end);
}

/* Latencies of placements of the same units; `serving` and its arrays must outlive it. */
EXPORT void *hexswarm_latency_prepare(const Serving *serving) {
    Mean *mean = malloc(sizeof *mean);
    if (mean && !mean_prepare(mean, serving)) {
        mean_release(mean);
        free(mean);
        return NULL;
    }
    return mean;
}

EXPORT void hexswarm_latency_release(void *mean) {
    if (mean) mean_release(mean);
    free(mean);
}

/* 0: no request can be served. `shares` has room for all units, or is NULL. */
EXPORT int64_t hexswarm_latency_expect(void *prepared, const int32_t *first, const int32_t *end,
                                       Expected *expected, double *shares) {
    Mean *mean = prepared;
    if (!mean_expect(mean, first, end, expected)) return 0;
    for (int32_t i = 0; shares && i < mean->n; i++) shares[mean->at[i]] = mean->share[i];
    return 1;
}
