package gateway

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// memory is a Backend over blocktest.Device. It takes effect at a random time
// between the call and the answer, and fails the test when two changes to
// overlapping blocks are in flight (W2), a piece has an illegal shape, or a
// checksum is wrong.
type memory struct {
	t       testing.TB
	loop    loop.Loop
	rand    *rand.Rand
	dev     *blocktest.Device
	geom    block.Geometry
	changed func()
	ended   func(error)
	flight  map[*span]bool
	calls   map[string]int
	// hold, if set, keeps changes from being answered until it is called with
	// what they would have answered.
	held   []func()
	hold   bool
	refuse error
	closed bool
}

func newMemory(t testing.TB, l loop.Loop, size int64) *memory {
	m := &memory{t: t, loop: l, rand: rand.New(rand.NewPCG(uint64(size), 7)), flight: map[*span]bool{}, calls: map[string]int{}}
	m.dev = blocktest.New(blocktest.Options{Bytes: (size + block.Size - 1) &^ (block.Size - 1)})
	m.geom = block.Geometry{Name: "test", ID: block.VolumeID{1}, SizeBytes: size, LogicalBlockBytes: 512, PreferredBytes: block.Size, MaxBytes: MaxPieceBytes}
	return m
}

func (m *memory) Geometry() block.Geometry { return m.geom }

func (m *memory) Watch(changed func(), ended func(error)) { m.changed, m.ended = changed, ended }

// later calls f after a few turns of the loop.
func (m *memory) later(f func()) {
	if n := m.rand.IntN(4); n > 0 {
		m.loop.Post(func() { m.later(f) })
		return
	}
	m.loop.Post(f)
}

func (m *memory) change(what string, from, to int64, do func() error, done func(error)) {
	m.calls[what]++
	s := &span{uint64(from / block.Size), uint64(to / block.Size)}
	for o := range m.flight {
		if o.overlaps(*s) {
			m.t.Errorf("%s of blocks %v while %v is in flight", what, *s, *o)
		}
	}
	m.flight[s] = true
	answer := func(err error) {
		delete(m.flight, s)
		done(err)
	}
	if m.refuse != nil {
		m.later(func() { answer(m.refuse) })
		return
	}
	m.later(func() {
		err := do()
		if m.hold {
			m.held = append(m.held, func() { answer(err) })
			return
		}
		m.later(func() { answer(err) })
	})
}

func (m *memory) Write(c block.Chunk, at block.Index, p *payload.Buf, crcs []uint32, done func(error)) {
	if p.Len() == 0 || p.Len()%block.Size != 0 || p.Len() > MaxPieceBytes || int(at)+p.Len()/block.Size > block.BlocksPerChunk || len(crcs) != p.Len()/block.Size {
		m.t.Errorf("write of %d bytes with %d checksums at block %d of chunk %d", p.Len(), len(crcs), at, c)
	}
	for i, crc := range crcs {
		if crc != block.CRC(p.Bytes()[i*block.Size:][:block.Size]) {
			m.t.Errorf("wrong checksum of block %d of chunk %d", int(at)+i, c)
		}
	}
	off := block.Offset(c, at)
	m.change("write", off, off+int64(p.Len()), func() error {
		defer p.Release()
		return m.dev.WriteAt(context.Background(), p.Bytes(), off, 0)
	}, done)
}

func (m *memory) Zero(c block.Chunk, at block.Index, count int, done func(error)) {
	if count <= 0 || int(at)+count > block.BlocksPerChunk {
		m.t.Errorf("zero of %d blocks at %d", count, at)
	}
	off := block.Offset(c, at)
	n := int64(count) * block.Size
	m.change("zero", off, off+n, func() error { return m.dev.Trim(context.Background(), off, n, 0) }, done)
}

func (m *memory) Mark(from, to block.Chunk, done func(error)) {
	off, n := block.Offset(from, 0), int64(to-from)*block.ChunkBytes
	if n <= 0 || off+n > m.dev.Geometry().SizeBytes {
		m.t.Errorf("mark of chunks %d to %d", from, to)
	}
	m.change("mark", off, off+n, func() error { return m.dev.Trim(context.Background(), off, n, 0) }, done)
}

func (m *memory) Read(ctx context.Context, c block.Chunk, at block.Index, count int, done func([]payload.Piece, error)) {
	m.calls["read"]++
	if count <= 0 || count > MaxPieceBytes/block.Size || int(at)+count > block.BlocksPerChunk {
		m.t.Errorf("read of %d blocks at %d", count, at)
	}
	m.later(func() {
		if ctx.Err() != nil {
			done(nil, canceled(ctx))
			return
		}
		var pieces []payload.Piece
		for i := 0; i < count; {
			n := 1 + m.rand.IntN(count-i)
			before := m.rand.IntN(2) * block.Size
			buf := payload.New(before + n*block.Size)
			err := m.dev.ReadAt(context.Background(), buf.Bytes()[before:], block.Offset(c, at+block.Index(i)))
			if err != nil {
				m.t.Errorf("read: %v", err)
			}
			i += n
			if allZero(buf.Bytes()[before:]) {
				buf.Release()
				pieces = append(pieces, payload.Piece{Bytes: n * block.Size})
				continue
			}
			pieces = append(pieces, payload.Piece{Bytes: n * block.Size, Off: before, Buf: buf})
		}
		m.later(func() { done(pieces, nil) })
	})
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

func (m *memory) Map(ctx context.Context, from, to block.Chunk, done func([]block.Extent, error)) {
	m.calls["map"]++
	off := block.Offset(from, 0)
	end := min(block.Offset(to, 0), m.dev.Geometry().SizeBytes)
	m.later(func() {
		if ctx.Err() != nil {
			done(nil, canceled(ctx))
			return
		}
		got, err := m.dev.Extents(context.Background(), nil, off, end-off, 1000)
		done(got, err)
	})
}

func (m *memory) Close(done func(error)) {
	if m.closed {
		m.t.Errorf("closed twice")
	}
	m.closed = true
	m.loop.Post(func() { done(nil) })
}

func (m *memory) releaseHeld() {
	for _, f := range m.held {
		m.loop.Post(f)
	}
	m.held, m.hold = nil, false
}

func (m *memory) String() string { return fmt.Sprint(m.calls) }
