package gateway

import (
	"context"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// pieceKind says which call of the Backend a piece is.
type pieceKind uint8

const (
	pieceWrite pieceKind = iota
	pieceZero
	pieceMark
)

// piece is the part of a change that is one call to the Backend.
type piece struct {
	change *change
	kind   pieceKind
	chunk  block.Chunk
	to     block.Chunk // pieceMark
	at     block.Index
	count  int
	buf    *payload.Buf // pieceWrite
	crcs   []uint32
	done   func(error) // p.answered, bound once
}

// edge is a block of which a change covers only the bytes [lo, hi): the others
// are read first, under the change's mark.
type edge struct {
	piece  int // of change.pieces
	at     int // where the block begins in the piece's buffer
	lo, hi int
	// drop: the change is zeros, and nothing has to be done if the block reads
	// as zeros already.
	drop bool
}

// change is one write, trim or write of zeroes on its way through the core. It
// is prepared off the loop and from start on belongs to the loop.
//
//	start -> claim the blocks -> read edges -> send all pieces -> all answered -> release, finish
//
// Its blocks stay claimed until every piece has a definite answer, whether or
// not somebody still waits (W4).
type change struct {
	v      *Volume
	ctx    context.Context // looked at until the first piece is sent
	off, n int64
	mark   mark
	pieces []piece
	one    [1]piece // pieces, if there is one
	oneCRC [1]uint32
	edges  [2]edge
	nEdges int
	left   int
	size   int64 // of the device when the change was prepared
	zeros  bool  // trim or write of zeroes
	merged bool  // it is of the merger's batch at work
	err    error
	finish func() // called once, on the loop; err is set
}

// init binds what does not change when a change is used again.
func (c *change) init(v *Volume) {
	c.v = v
	c.mark.granted = c.granted
	c.one[0].bind(c)
}

// reset makes a change that has ended ready to be prepared again.
func (c *change) reset() {
	c.ctx, c.pieces, c.nEdges, c.left, c.err, c.finish = nil, nil, 0, 0, nil, nil
}

func (p *piece) bind(c *change) {
	p.change = c
	p.done = p.answered
}

// addPiece returns a new piece of a change that will have at most total.
func (c *change) addPiece(total int) *piece {
	if total == 1 {
		c.pieces = c.one[:1]
		p := &c.one[0]
		p.kind, p.buf, p.crcs = pieceWrite, nil, nil
		return p
	}
	if c.pieces == nil {
		c.pieces = make([]piece, 0, total) // never grows: pieces are pointed at
	}
	c.pieces = append(c.pieces, piece{})
	p := &c.pieces[len(c.pieces)-1]
	p.bind(c)
	return p
}

// prepareWrite copies p, sums it, and finds the pieces and edges of a write of
// p at off, within a device of size bytes.
func (c *change) prepareWrite(p []byte, off, size int64) {
	c.setRange(off, int64(len(p)), size)
	c.zeros = false
	first, last := off/MaxPieceBytes, (off+int64(len(p))-1)/MaxPieceBytes
	for i := first; i <= last; i++ {
		lo, hi := max(off, i*MaxPieceBytes), min(off+int64(len(p)), (i+1)*MaxPieceBytes)
		c.addData(lo, hi, p[lo-off:hi-off], size, int(last-first+1))
	}
}

// setRange says which bytes the change is about.
func (c *change) setRange(off, n, size int64) {
	c.off, c.n, c.size = off, n, size
	c.mark.span = span{uint64(off / block.Size), uint64((off + n + block.Size - 1) / block.Size)}
}

// addData adds a piece that writes data at [lo, hi), with its edges. nil data
// are zeros. Bytes between the end of the device and the end of its last block
// are zeros always.
func (c *change) addData(lo, hi int64, data []byte, size int64, total int) {
	start, end := lo&^(block.Size-1), (hi+block.Size-1)&^(block.Size-1)
	p := c.addPiece(total)
	p.chunk, p.at, p.count = block.ChunkAt(start), block.IndexAt(start), int((end-start)/block.Size)
	p.buf = payload.New(int(end - start))
	b := p.buf.Bytes()
	if data != nil {
		copy(b[lo-start:], data)
	} else {
		clear(b)
	}
	head, tail := int(lo-start), int(end-hi)
	if hi == size {
		clear(b[len(b)-tail:])
		tail = 0
	}
	clear(b[:head])
	clear(b[len(b)-tail:])
	index := len(c.pieces) - 1
	if head > 0 {
		c.addEdge(edge{piece: index, at: 0, lo: head, hi: min(block.Size, len(b)-tail), drop: data == nil})
	}
	if tail > 0 && (head == 0 || p.count > 1) {
		c.addEdge(edge{piece: index, at: len(b) - block.Size, lo: 0, hi: block.Size - tail, drop: data == nil})
	}
	crcs := c.oneCRC[:0]
	if total > 1 || p.count > 1 {
		crcs = make([]uint32, 0, p.count)
	}
	p.crcs = block.AppendCRCs(crcs, b)
}

// repad makes up for a grow since the change was prepared: the bytes between
// the old end and the end of its block are not known to be zeros any more.
func (c *change) repad(size int64) {
	end := c.off + c.n
	rest := int(end & (block.Size - 1))
	if size == c.size || end != c.size || rest == 0 {
		return
	}
	last := len(c.pieces) - 1
	p := &c.pieces[last]
	if p.kind != pieceWrite {
		if p.kind == pieceMark {
			p.to--
			c.addZero(block.Offset(p.to, 0), end-int64(rest))
		} else {
			p.count--
		}
		c.addData(end-int64(rest), end, nil, size, maxZeroPieces)
		return
	}
	e := edge{piece: last, at: (p.count - 1) * block.Size, hi: rest, drop: c.zeros}
	for i := range c.edges[:c.nEdges] {
		if have := &c.edges[i]; have.piece == last && have.at == e.at {
			have.hi = rest
			return
		}
	}
	c.addEdge(e)
}

func (c *change) addEdge(e edge) {
	c.edges[c.nEdges] = e
	c.nEdges++
}

// maxZeroPieces is what a range of zeros falls into at most: two partial
// blocks, two partial chunks, and the whole chunks between.
const maxZeroPieces = 5

// prepareZero finds the pieces and edges that make [off, off+n) zero: partial
// blocks are written, whole blocks zeroed, whole chunks marked.
func (c *change) prepareZero(off, n, size int64) {
	c.setRange(off, n, size)
	c.zeros = true
	end := off + n
	from, to := (off+block.Size-1)&^(block.Size-1), end&^(block.Size-1)
	if end == size {
		to = (end + block.Size - 1) &^ (block.Size - 1)
	}
	if from > to { // within one block
		c.addData(off, end, nil, size, 1)
		return
	}
	if off < from {
		c.addData(off, from, nil, size, maxZeroPieces)
	}
	if to < end {
		c.addData(to, end, nil, size, maxZeroPieces)
	}
	firstWhole, lastWhole := (from+block.ChunkBytes-1)/block.ChunkBytes, to/block.ChunkBytes
	if firstWhole >= lastWhole {
		for from < to {
			next := min(to, (from/block.ChunkBytes+1)*block.ChunkBytes)
			c.addZero(from, next)
			from = next
		}
		return
	}
	c.addZero(from, firstWhole*block.ChunkBytes)
	p := c.addPiece(maxZeroPieces)
	p.kind, p.chunk, p.to = pieceMark, block.Chunk(firstWhole), block.Chunk(lastWhole)
	c.addZero(lastWhole*block.ChunkBytes, to)
}

// addZero adds a piece for the whole blocks [from, to) of one chunk, if any.
func (c *change) addZero(from, to int64) {
	if from == to {
		return
	}
	p := c.addPiece(maxZeroPieces)
	p.kind, p.chunk, p.at, p.count = pieceZero, block.ChunkAt(from), block.IndexAt(from), int((to-from)/block.Size)
}

// start begins the change, on the loop.
func (c *change) start() {
	if err := c.v.refusal(c.off, c.n, true); err != nil {
		c.fail(err)
		return
	}
	if c.ctx.Err() != nil {
		c.fail(canceled(c.ctx))
		return
	}
	if c.zeros && c.n >= mergeBytes {
		c.v.merger.admit(c)
		return
	}
	c.claim()
}

// claim asks for the blocks of the change.
func (c *change) claim() {
	if !c.v.marks.claim(&c.mark) {
		c.v.stats.waited.Add(1)
	}
}

// granted goes on once the blocks are claimed.
func (c *change) granted() {
	err := c.v.refusal(c.off, c.n, true) // the volume may have shrunk or ended meanwhile
	if err == nil && c.ctx.Err() != nil {
		err = canceled(c.ctx)
	}
	c.repad(c.v.geom.Load().SizeBytes)
	switch {
	case err != nil:
		c.err = err
		c.release()
	case c.nEdges > 0:
		c.left = c.nEdges
		c.v.stats.edges.Add(uint64(c.nEdges))
		for i := range c.edges[:c.nEdges] {
			c.readEdge(&c.edges[i])
		}
	default:
		c.send()
	}
}

func (c *change) readEdge(e *edge) {
	p := &c.pieces[e.piece]
	index := p.at + block.Index(e.at/block.Size)
	c.v.backend.Read(c.ctx, p.chunk, index, 1, func(got []payload.Piece, err error) {
		c.left--
		if err != nil {
			c.err = first(c.err, err)
		} else {
			c.fill(p, e, got)
		}
		switch {
		case c.left > 0:
		case c.err != nil:
			c.release()
		default:
			c.send()
		}
	})
}

// fill puts what was read around what is written.
func (c *change) fill(p *piece, e *edge, got []payload.Piece) {
	for _, g := range got {
		if g.Buf == nil {
			continue
		}
		e.drop = false
		b := p.buf.Bytes()[e.at:][:block.Size]
		old := g.Data()
		copy(b[:e.lo], old[:e.lo])
		copy(b[e.hi:], old[e.hi:])
		p.crcs[e.at/block.Size] = block.CRC(b)
		g.Buf.Release()
	}
}

// send sends all pieces at once: those of different groups travel in parallel.
func (c *change) send() {
	for _, e := range c.edges[:c.nEdges] {
		if e.drop {
			// Zeros into zeros.
			c.pieces[e.piece].buf.Release()
			c.pieces[e.piece].buf = nil
		}
	}
	c.left = 1 // holds the change together until all pieces are sent
	for i := range c.pieces {
		p := &c.pieces[i]
		switch p.kind {
		case pieceWrite:
			if p.buf == nil {
				continue
			}
			c.left++
			buf := p.buf
			p.buf = nil
			c.v.backend.Write(p.chunk, p.at, buf, p.crcs, p.done)
		case pieceZero:
			if p.count == 0 {
				continue
			}
			c.left++
			c.v.backend.Zero(p.chunk, p.at, p.count, p.done)
		case pieceMark:
			if p.chunk == p.to {
				continue
			}
			c.left++
			c.v.backend.Mark(p.chunk, p.to, p.done)
		}
	}
	c.pieceDone()
}

func (p *piece) answered(err error) {
	p.change.err = first(p.change.err, err)
	p.change.pieceDone()
}

func (c *change) pieceDone() {
	c.left--
	if c.left == 0 {
		c.release()
	}
}

// release ends a change whose claim holds.
func (c *change) release() {
	c.v.marks.release(&c.mark)
	c.end()
}

// fail ends a change that claims nothing yet.
func (c *change) fail(err error) {
	c.err = err
	c.end()
}

func (c *change) end() {
	for i := range c.pieces {
		if c.pieces[i].buf != nil {
			c.pieces[i].buf.Release()
			c.pieces[i].buf = nil
		}
	}
	merged, v := c.merged, c.v
	c.merged = false
	c.finish() // c is its caller's again
	if merged {
		v.merger.done()
	}
}

func first(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

func canceled(ctx context.Context) error {
	return block.Wrap(block.Canceled, context.Cause(ctx), "the caller gave up")
}
