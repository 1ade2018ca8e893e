package gateway

import (
	"context"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// read is one read on its way through the core. It claims nothing: beside a
// write in flight it may see either content of each block.
type read struct {
	v      *Volume
	ctx    context.Context
	off    int64
	n      int
	parts  []readPart
	one    [1]readPart
	left   int
	err    error
	finish func() // called once, on the loop; err is set
}

// readPart is what one call to the Backend answers.
type readPart struct {
	read   *read
	pieces []payload.Piece
	two    [2]payload.Piece
	done   func([]payload.Piece, error) // part.answered, bound once
}

func (r *read) prepare(ctx context.Context, off int64, n int) {
	r.ctx, r.off, r.n = ctx, off, n
	parts := int((off+int64(n)-1)/MaxPieceBytes - off/MaxPieceBytes + 1)
	r.parts = r.one[:]
	if parts > 1 {
		r.parts = make([]readPart, parts)
	}
	for i := range r.parts {
		if p := &r.parts[i]; p.read == nil {
			p.read = r
			p.done = p.answered
		}
	}
}

func (r *read) reset() {
	r.ctx, r.parts, r.left, r.err, r.finish = nil, nil, 0, nil, nil
}

func (r *read) start() {
	if err := r.v.refusal(r.off, int64(r.n), false); err != nil {
		r.err = err
		r.finish()
		return
	}
	end := r.off + int64(r.n)
	from := r.off &^ (block.Size - 1)
	r.left = len(r.parts)
	for i := range r.parts {
		to := min((from/MaxPieceBytes+1)*MaxPieceBytes, (end+block.Size-1)&^(block.Size-1))
		r.v.backend.Read(r.ctx, block.ChunkAt(from), block.IndexAt(from), int((to-from)/block.Size), r.parts[i].done)
		from = to
	}
}

func (p *readPart) answered(pieces []payload.Piece, err error) {
	r := p.read
	r.err = first(r.err, err)
	p.pieces = append(p.two[:0], pieces...)
	r.left--
	if r.left == 0 {
		r.finish()
	}
}

// copyTo fills dst, of r.n bytes, if there was no error, and gives the buffers
// back. It may be called off the loop.
func (r *read) copyTo(dst []byte) {
	skip := int(r.off & (block.Size - 1))
	for i := range r.parts {
		part := &r.parts[i]
		for j := range part.pieces {
			g := &part.pieces[j]
			if r.err == nil {
				n := min(max(0, g.Bytes-skip), len(dst))
				if g.Buf != nil {
					copy(dst[:n], g.Data()[min(skip, g.Bytes):])
				} else {
					clear(dst[:n])
				}
				dst = dst[n:]
				skip = max(0, skip-g.Bytes)
			}
			if g.Buf != nil {
				g.Buf.Release()
			}
			*g = payload.Piece{}
		}
		part.pieces = nil
	}
}

// drop gives the buffers back.
func (r *read) drop() {
	r.err = first(r.err, block.Canceled)
	r.copyTo(nil)
}

// The first call to Backend.Map asks for few chunks; as long as answers are
// short, the next ones ask for more. So the map of a hole of 16 TiB takes a few
// calls, and that of a full volume never makes long answers for nothing.
const (
	firstMapChunks = 1024
	growMapWindow  = 16
	shortMapAnswer = 64
)

// mapping is one request for extents on its way through the core.
type mapping struct {
	v       *Volume
	ctx     context.Context
	off     int64
	left    int64
	max     int
	window  int64 // chunks
	extents []block.Extent
	err     error
	finish  func() // called once, on the loop; extents or err are set
}

func (m *mapping) start() {
	if m.window == 0 {
		m.window = firstMapChunks
	}
	m.err = m.v.refusal(m.off, m.left, false)
	if m.err != nil {
		m.finish()
		return
	}
	from := block.ChunkAt(m.off)
	last := int64(block.ChunkAt(m.off + m.left - 1))
	to := block.Chunk(min(last+1, int64(from)+m.window))
	m.v.backend.Map(m.ctx, from, to, func(got []block.Extent, err error) {
		if err != nil {
			m.err = err
			m.finish()
			return
		}
		m.take(got, block.Offset(from, 0))
		if m.left == 0 || len(m.extents) >= m.max {
			m.finish()
			return
		}
		if len(got) < shortMapAnswer {
			m.window *= growMapWindow
		}
		m.start()
	})
}

// take adds the extents from m.off on; got begins at byte at, before or at m.off.
// When max is reached the last extent is complete as far as known: one more
// state has been seen, or the answer ended.
func (m *mapping) take(got []block.Extent, at int64) {
	for _, e := range got {
		end := at + e.Bytes
		n := min(end-m.off, m.left)
		at = end
		if n <= 0 {
			continue
		}
		if k := len(m.extents); k > 0 && m.extents[k-1].State == e.State {
			m.extents[k-1].Bytes += n
		} else if k == m.max {
			return
		} else {
			m.extents = append(m.extents, block.Extent{Bytes: n, State: e.State})
		}
		m.off += n
		m.left -= n
	}
}
