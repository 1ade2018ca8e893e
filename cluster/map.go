package cluster

import (
	"cmp"
	"context"
	"slices"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// mapJob joins the answers of the groups that hold a range of chunks of one
// span.
type mapJob struct {
	from, to block.Chunk
	runs     []wire.Run
	left     int
	err      error
	done     func([]block.Extent, error)
}

// Map gives the states of chunks from the first byte of chunk from on.
func (a *Attachment) Map(ctx context.Context, from, to block.Chunk, done func([]block.Extent, error)) {
	to = min(to, (block.Chunk(from.Span())+1)*block.ChunksPerSpan)
	_, err := a.readable(from)
	if err != nil {
		a.client.loop.Post(func() { done(nil, err) })
		return
	}
	streams := a.holders(from, to)
	j := &mapJob{from: from, to: to, left: len(streams), done: done}
	for _, s := range streams {
		q := a.client.newQuery(ctx, s)
		q.answered = j.answered
		q.req.Kind, q.req.Chunk, q.req.ToChunk = wire.ReqMap, from, to
		q.send()
	}
}

func (j *mapJob) answered(resp *wire.Response, err error) {
	j.left--
	switch {
	case err != nil:
		j.err = err
	case resp.Covered <= j.from && j.err == nil:
		j.err = block.Errorf(block.Internal, "group %d mapped nothing of the chunks %d to %d", resp.Group, j.from, j.to)
	default:
		j.to = min(j.to, resp.Covered)
		j.runs = append(j.runs, resp.Runs...)
	}
	if j.left > 0 {
		return
	}
	if j.err != nil {
		j.done(nil, j.err)
		return
	}
	j.done(j.extents(), nil)
}

// extents are the runs of all groups in order, with holes between them.
func (j *mapJob) extents() []block.Extent {
	slices.SortFunc(j.runs, func(a, b wire.Run) int {
		return cmp.Or(cmp.Compare(a.Chunk, b.Chunk), cmp.Compare(a.Block, b.Block))
	})
	var out []block.Extent
	at := block.Offset(j.from, 0)
	add := func(end int64, state block.ExtentState) {
		if n := len(out); n > 0 && out[n-1].State == state {
			out[n-1].Bytes += end - at
		} else {
			out = append(out, block.Extent{Bytes: end - at, State: state})
		}
		at = end
	}
	for _, r := range j.runs {
		start := block.Offset(r.Chunk, r.Block)
		if r.Chunk >= j.to || start < at {
			continue
		}
		if start > at {
			add(start, block.Hole)
		}
		add(start+int64(r.Count)*block.Size, r.State)
	}
	if end := block.Offset(j.to, 0); at < end {
		add(end, block.Hole)
	}
	return out
}
