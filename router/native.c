/* The hot path of the router: shortest rings under two limits, and the choice of candidates.
 *
 * search.py tells the theory and has the same algorithm in Python, which tests compare with this one;
 * the structs below are mirrored in native.py. Nothing here calls Python: plain arrays in, plain
 * arrays out, so that the interpreter's lock need not be held.
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
