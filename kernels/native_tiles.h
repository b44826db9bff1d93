/* Matrix products of more rows than `strip` likes: tiles of sums in registers. Part of
 * native_layers.h, once per instruction set and kind of stored numbers.
 *
 * A strip loads and stores its sums for every four rows of weights. That is cheap beside reading
 * the weights from memory for a few tokens; from `MANY` tokens on it is what the time goes into.
 * Here the sums of BAND tokens and three vectors of columns stay in registers while DEPTH rows of
 * weights pass by. For that a panel of the weights, three vectors wide, is copied (and widened)
 * into the nearest cache, where all bands of tokens find it, and the tokens so that a band's
 * factors adjoin. The next panel is fetched from memory meanwhile.
 *
 * A sum still goes through k in ascending order, one fused multiply-add per term: these are the
 * bits of the strips, whatever the number of rows. */

#define PANEL (3 * LANES)
#define BAND (LANES == 16 ? 8 : 4) /* with three vectors of each: all registers but a few */

/* sums += x @ panel for a band: x `[depth, BAND]`, panel `[depth, PANEL]`, sums with rows `stride`
 * apart. Meanwhile fetches rows of `ahead`, at most `rows_ahead`, `width` apart. */
static void NAME(band)(float *sums, int64_t stride, const float *x, const float *panel,
                       int64_t depth, const stored *ahead, int64_t rows_ahead, int64_t width) {
    vec acc[BAND][3];
    UNROLL for (int r = 0; r < BAND; r++)
        UNROLL for (int v = 0; v < 3; v++) acc[r][v] = NAME(load)(sums + r * stride + v * LANES);
    for (int64_t k = 0; k < depth; k++, x += BAND, panel += PANEL) {
        if (k & 1 && rows_ahead > 0) {
            UNROLL for (int line = 0; line < PANEL; line += LINE)
                __builtin_prefetch(ahead + line, 0, 2);
            ahead += width, rows_ahead--;
        }
        const vec w0 = NAME(load)(panel), w1 = NAME(load)(panel + LANES),
                  w2 = NAME(load)(panel + 2 * LANES);
        UNROLL for (int r = 0; r < BAND; r++) {
            acc[r][0] += x[r] * w0;
            acc[r][1] += x[r] * w1;
            acc[r][2] += x[r] * w2;
        }
    }
    UNROLL for (int r = 0; r < BAND; r++)
        UNROLL for (int v = 0; v < 3; v++) NAME(store)(sums + r * stride + v * LANES, acc[r][v]);
}

/* A panel of `depth` rows and n <= PANEL columns of w; the rest of it is zero. */
static void NAME(pack_panel)(float *panel, const stored *w, int64_t width, int64_t depth,
                             int64_t n) {
    if (n == PANEL)
        for (int64_t k = 0; k < depth; k++, w += width, panel += PANEL)
            UNROLL for (int v = 0; v < 3; v++)
                NAME(store)(panel + v * LANES, NAME(fetch)(w + v * LANES));
    else
        for (int64_t k = 0; k < depth; k++, w += width, panel += PANEL)
            for (int64_t j = 0; j < PANEL; j++) panel[j] = j < n ? NAME(fetch_one)(w + j) : 0;
}

/* Tokens in bands, `[bands, depth, BAND]`; the last is filled up with zeros. */
static void NAME(pack_rows)(float *packed, const float *x, int64_t x_stride, int rows,
                            int64_t depth) {
    for (int first = 0; first < rows; first += BAND, x += BAND * x_stride)
        for (int64_t k = 0; k < depth; k++, packed += BAND)
            for (int r = 0; r < BAND; r++)
                packed[r] = first + r < rows ? x[r * x_stride + k] : 0;
}

/* One panel of one depth: sums of all bands, by way of `edge` where a tile is not whole. */
static void NAME(panel_bands)(float *sums, int64_t stride, const float *packed, int rows,
                              const float *panel, int64_t depth, int64_t n, const stored *ahead,
                              int64_t rows_ahead, int64_t width) {
    float edge[BAND * PANEL];
    for (int r = 0; r < rows; r += BAND, packed += depth * BAND, sums += BAND * stride) {
        const int64_t some = MIN(rows_ahead, depth / 2);
        const int whole = n == PANEL && r + BAND <= rows, high = MIN(BAND, rows - r);
        if (whole)
            NAME(band)(sums, stride, packed, panel, depth, ahead, some, width);
        else {
            memset(edge, 0, sizeof edge);
            for (int i = 0; i < high; i++)
                memcpy(edge + i * PANEL, sums + i * stride, (size_t)n * sizeof *edge);
            NAME(band)(edge, PANEL, packed, panel, depth, ahead, some, width);
            for (int i = 0; i < high; i++)
                memcpy(sums + i * stride, edge + i * PANEL, (size_t)n * sizeof *edge);
        }
        ahead += some * width, rows_ahead -= some;
    }
}

/* As `multiply`, for up to MOST rows. With `add` the product goes by way of `room`. */
static void NAME(multiply_many)(float *y, int add, float *room, const float *x, int64_t x_stride,
                                int rows, const stored *w, int64_t depth, int64_t width,
                                const float *bias, struct range own) {
    float panel[DEPTH * PANEL] __attribute__((aligned(64)));
    float packed[DEPTH * MOST] __attribute__((aligned(64)));
    float *sums = add ? room : y;
    for (int r = 0; r < rows; r++)
        for (int64_t j = own.first; j < own.end; j++) sums[r * width + j] = bias ? bias[j] : 0;
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t deep = MIN(DEPTH, depth - k);
        NAME(pack_rows)(packed, x + k, x_stride, rows, deep);
        for (int64_t j = own.first; j < own.end; j += PANEL) {
            const stored *at = w + k * width + j;
            const int last = j + PANEL >= own.end;
            const int64_t below = depth - k - DEPTH; /* rows after these */
            const stored *ahead = last ? w + (k + DEPTH) * width + own.first : at + PANEL;
            NAME(pack_panel)(panel, at, width, deep, MIN(PANEL, own.end - j));
            NAME(panel_bands)(sums + j, width, packed, rows, panel, deep, MIN(PANEL, own.end - j),
                              ahead, last ? MIN(DEPTH, below) : deep, width);
        }
    }
    if (add)
        for (int r = 0; r < rows; r++)
            for (int64_t j = own.first; j < own.end; j++) y[r * width + j] += room[r * width + j];
}

/* One thread's columns of y = x @ w + bias, or of y += that. */
static void NAME(product)(struct team *team, int thread, const void *job) {
    const struct product *p = job;
    const struct range own = columns(p->width, thread, team->threads);
    for (int64_t r = 0; r < p->rows; r += MOST)
        NAME(multiply_many)(p->y + r * p->width, p->room != NULL, p->room, p->x + r * p->x_stride,
                            p->x_stride, (int)MIN(MOST, p->rows - r), p->weight, p->depth,
                            p->width, p->bias, own);
}

#undef PANEL
#undef BAND
