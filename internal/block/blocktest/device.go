// Package blocktest holds a block.Device in memory, the conformance suite that
// every Device passes ([Run]), and benchmarks that every Device can run
// ([Bench]).
package blocktest

import (
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"firn.io/firn/internal/block"
)

const (
	pageBytes     = 64 << 10
	pagesPerChunk = block.ChunkBytes / pageBytes
	// maxBytes is what a Device of this package takes in one read or write.
	maxBytes = 1 << 20
)

// Op names a method of block.Device for [Options.Before].
type Op string

const (
	OpRead    Op = "read"
	OpWrite   Op = "write"
	OpFlush   Op = "flush"
	OpTrim    Op = "trim"
	OpZeroes  Op = "zeroes"
	OpExtents Op = "extents"
)

// Options of a [Device].
type Options struct {
	// Bytes is the size, a multiple of 512.
	Bytes int64
	// Name and ID are shown in the geometry.
	Name string
	ID   block.VolumeID
	// LogicalBlockBytes is 512 if 0.
	LogicalBlockBytes int
	// NoLending makes ReadMemory answer nothing.
	NoLending bool
	// Before, if set, is called before each operation and may wait, or fail it.
	// It is not called by ReadMemory.
	Before func(ctx context.Context, op Op, off, n int64) error
}

// Device is a sparse block device in memory: what the real ones are compared
// with. It is a block.MemoryReader, Prefetcher and ResizeNotifier.
//
// A chunk's lock makes each operation atomic chunk by chunk, which is more than
// a Device must be. Lent pages are never changed: a write to one replaces it.
type Device struct {
	opt  Options
	geom atomic.Pointer[block.Geometry]

	// mu guards chunks and notify, and is held shared by every operation, so
	// that a resize has the device to itself.
	mu       sync.RWMutex
	chunks   map[block.Chunk]*chunk
	notify   map[int]func(block.Geometry)
	notifyID int

	lent    atomic.Int64
	flushes atomic.Int64
}

type chunk struct {
	mu    sync.RWMutex
	pages [pagesPerChunk]*page
	state [block.BlocksPerChunk]block.ExtentState
}

// page is 64 KiB with the number of loans of it. A page of no loans is changed
// in place.
type page struct {
	loans atomic.Int32
	b     [pageBytes]byte
}

var zeroPage page

// New returns a device that reads as zero.
func New(opt Options) *Device {
	if opt.LogicalBlockBytes == 0 {
		opt.LogicalBlockBytes = 512
	}
	d := &Device{opt: opt, chunks: map[block.Chunk]*chunk{}, notify: map[int]func(block.Geometry){}}
	d.geom.Store(&block.Geometry{Name: opt.Name, ID: opt.ID, SizeBytes: opt.Bytes,
		LogicalBlockBytes: opt.LogicalBlockBytes, PreferredBytes: block.Size, MaxBytes: maxBytes})
	return d
}

// Geometry implements block.Device.
func (d *Device) Geometry() block.Geometry { return *d.geom.Load() }

// Lent returns how many loans were not released yet.
func (d *Device) Lent() int64 { return d.lent.Load() }

// Flushes returns how many calls of Flush were answered.
func (d *Device) Flushes() int64 { return d.flushes.Load() }

// Resize changes the size and tells those who asked to know. What a shrink cuts
// off reads as zero when the device grows again.
func (d *Device) Resize(bytes int64) {
	d.mu.Lock()
	old := *d.geom.Load()
	for off := bytes; off < old.SizeBytes; {
		n := min(old.SizeBytes-off, block.ChunkBytes-off%block.ChunkBytes)
		if c := d.chunks[block.ChunkAt(off)]; c != nil {
			c.clear(int(off%block.ChunkBytes), int(n), block.Hole)
		}
		off += n
	}
	for id := range d.chunks {
		if block.Offset(id, 0) >= bytes {
			delete(d.chunks, id)
		}
	}
	d.mu.Unlock()
	d.change(func(g *block.Geometry) { g.SizeBytes = bytes })
}

// SetReadOnly switches between refusing and taking changes.
func (d *Device) SetReadOnly(on bool) { d.change(func(g *block.Geometry) { g.ReadOnly = on }) }

func (d *Device) change(f func(*block.Geometry)) {
	d.mu.Lock()
	g := *d.geom.Load()
	f(&g)
	d.geom.Store(&g)
	var tell []func(block.Geometry)
	for _, id := range slices.Sorted(maps.Keys(d.notify)) {
		tell = append(tell, d.notify[id])
	}
	d.mu.Unlock()
	for _, f := range tell {
		f(g)
	}
}

// NotifyResize implements block.ResizeNotifier.
func (d *Device) NotifyResize(f func(block.Geometry)) (stop func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	id := d.notifyID
	d.notifyID++
	d.notify[id] = f
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.notify, id)
	}
}

// begin does what all operations start with. On success it holds d.mu shared.
func (d *Device) begin(ctx context.Context, op Op, off, n int64, change bool) error {
	if d.opt.Before != nil {
		if err := d.opt.Before(ctx, op, off, n); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return block.Wrap(block.Canceled, err, "%s at %d", op, off)
	}
	d.mu.RLock()
	g := d.geom.Load()
	var err error
	switch {
	case off < 0 || n < 0 || off > g.SizeBytes || n > g.SizeBytes-off:
		err = block.Errorf(block.OutOfRange, "%s of %d bytes at %d: the device has %d", op, n, off, g.SizeBytes)
	case change && g.ReadOnly:
		err = block.Errorf(block.ReadOnly, "%s at %d: the device is read-only", op, off)
	case (op == OpRead || op == OpWrite) && n > maxBytes:
		err = block.Errorf(block.Invalid, "%s of %d bytes: at most %d in one request", op, n, maxBytes)
	}
	if err != nil {
		d.mu.RUnlock()
	}
	return err
}

// ReadAt implements block.Device.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := d.begin(ctx, OpRead, off, int64(len(p)), false); err != nil {
		return err
	}
	defer d.mu.RUnlock()
	for len(p) > 0 {
		at := int(off % block.ChunkBytes)
		n := min(len(p), block.ChunkBytes-at)
		if c := d.chunks[block.ChunkAt(off)]; c != nil {
			c.read(p[:n], at)
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// WriteAt implements block.Device.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := d.begin(ctx, OpWrite, off, int64(len(p)), true); err != nil {
		return err
	}
	defer d.mu.RUnlock()
	for len(p) > 0 {
		at := int(off % block.ChunkBytes)
		n := min(len(p), block.ChunkBytes-at)
		c := d.chunk(block.ChunkAt(off))
		if size := d.geom.Load().SizeBytes; off+int64(n) > size {
			return block.Errorf(block.OutOfRange, "write at %d: the device shrank to %d bytes", off, size)
		}
		c.write(p[:n], at)
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// chunk returns chunk id, made if it is missing; d.mu is held shared before
// and after, and not in between.
func (d *Device) chunk(id block.Chunk) *chunk {
	for {
		if c := d.chunks[id]; c != nil {
			return c
		}
		d.mu.RUnlock()
		d.mu.Lock()
		if d.chunks[id] == nil {
			c := new(chunk)
			for i := range c.state {
				c.state[i] = block.Hole
			}
			d.chunks[id] = c
		}
		d.mu.Unlock()
		d.mu.RLock()
	}
}

// Flush implements block.Device. Memory is as durable as it gets.
func (d *Device) Flush(ctx context.Context) error {
	if err := d.begin(ctx, OpFlush, 0, 0, false); err != nil {
		return err
	}
	d.mu.RUnlock()
	d.flushes.Add(1)
	return nil
}

// Trim implements block.Device.
func (d *Device) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return d.zero(ctx, OpTrim, off, n, block.Hole)
}

// WriteZeroes implements block.Device. It is always fast.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64, f block.Flags) error {
	state := block.Hole
	if f&block.NoHole != 0 {
		state = block.Zero
	}
	return d.zero(ctx, OpZeroes, off, n, state)
}

// zero costs what the chunks in memory cost, not what n is.
func (d *Device) zero(ctx context.Context, op Op, off, n int64, state block.ExtentState) error {
	if err := d.begin(ctx, op, off, n, true); err != nil {
		return err
	}
	defer d.mu.RUnlock()
	end := off + n
	one := func(id block.Chunk, c *chunk) {
		from := max(off, block.Offset(id, 0))
		to := min(end, block.Offset(id+1, 0))
		if from < to {
			c.clear(int(from-block.Offset(id, 0)), int(to-from), state)
		}
	}
	if n/block.ChunkBytes > int64(len(d.chunks)) {
		for id, c := range d.chunks {
			one(id, c)
		}
		return nil
	}
	for at := off; at < end; at = block.Offset(block.ChunkAt(at)+1, 0) {
		if c := d.chunks[block.ChunkAt(at)]; c != nil {
			one(block.ChunkAt(at), c)
		}
	}
	return nil
}

// Extents implements block.Device.
func (d *Device) Extents(ctx context.Context, dst []block.Extent, off, n int64, max int) ([]block.Extent, error) {
	if err := d.begin(ctx, OpExtents, off, n, false); err != nil {
		return dst, err
	}
	defer d.mu.RUnlock()
	first := len(dst)
	for n > 0 {
		run, state := min(n, block.ChunkBytes-off%block.ChunkBytes), block.Hole
		if c := d.chunks[block.ChunkAt(off)]; c != nil {
			run, state = c.run(off%block.ChunkBytes, run)
		}
		if last := len(dst) - 1; last >= first && dst[last].State == state {
			dst[last].Bytes += run
		} else {
			if len(dst)-first >= max {
				break
			}
			dst = append(dst, block.Extent{Bytes: run, State: state})
		}
		off, n = off+run, n-run
	}
	return dst, nil
}

// Prefetch implements block.Prefetcher; everything is in memory.
func (d *Device) Prefetch(ctx context.Context, off, n int64) error {
	if err := d.begin(ctx, "prefetch", off, n, false); err != nil {
		return err
	}
	d.mu.RUnlock()
	return nil
}

// loan is a part of a page. Loans are pooled: a hit allocates nothing.
type loan struct {
	d *Device
	p *page
	b []byte
}

var loans = sync.Pool{New: func() any { return new(loan) }}

func (l *loan) Bytes() []byte { return l.b }

func (l *loan) Release() {
	if l.d == nil {
		panic("blocktest: loan released twice")
	}
	l.p.loans.Add(-1)
	l.d.lent.Add(-1)
	*l = loan{}
	loans.Put(l)
}

// ReadMemory implements block.MemoryReader. It lends what lies within 64 KiB.
func (d *Device) ReadMemory(off int64, n int) (block.Lent, bool) {
	at := int(off & (pageBytes - 1))
	if d.opt.NoLending || off < 0 || n < 0 || at+n > pageBytes {
		return nil, false
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	if size := d.geom.Load().SizeBytes; off > size || int64(n) > size-off {
		return nil, false
	}
	p := &zeroPage
	if c := d.chunks[block.ChunkAt(off)]; c != nil {
		c.mu.RLock()
		defer c.mu.RUnlock()
		if q := c.pages[off%block.ChunkBytes/pageBytes]; q != nil {
			p = q
		}
	}
	p.loans.Add(1)
	d.lent.Add(1)
	l := loans.Get().(*loan)
	*l = loan{d, p, p.b[at : at+n : at+n]}
	return l, true
}

func (c *chunk) read(p []byte, at int) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for len(p) > 0 {
		n := min(len(p), pageBytes-at%pageBytes)
		if q := c.pages[at/pageBytes]; q != nil {
			copy(p[:n], q.b[at%pageBytes:])
		} else {
			clear(p[:n])
		}
		p, at = p[n:], at+n
	}
}

func (c *chunk) write(p []byte, at int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := at / block.Size; i <= (at+len(p)-1)/block.Size; i++ {
		c.state[i] = block.Data
	}
	for len(p) > 0 {
		n := min(len(p), pageBytes-at%pageBytes)
		copy(c.own(at / pageBytes).b[at%pageBytes:], p[:n])
		p, at = p[n:], at+n
	}
}

// clear zeroes n bytes at at. Whole blocks take the state; a block that is
// zeroed in part keeps its own.
func (c *chunk) clear(at, n int, state block.ExtentState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := (at + block.Size - 1) / block.Size; i < (at+n)/block.Size; i++ {
		c.state[i] = state
	}
	for n > 0 {
		k := min(n, pageBytes-at%pageBytes)
		switch i := at / pageBytes; {
		case k == pageBytes:
			c.pages[i] = nil
		case c.pages[i] != nil:
			clear(c.own(i).b[at%pageBytes:][:k])
		}
		at, n = at+k, n-k
	}
}

// own returns page i to be changed: made if missing, copied if lent.
func (c *chunk) own(i int) *page {
	switch p := c.pages[i]; {
	case p == nil:
		c.pages[i] = new(page)
	case p.loans.Load() != 0:
		q := new(page)
		q.b = p.b
		c.pages[i] = q
	}
	return c.pages[i]
}

// run returns the state at at and for how many of the next n bytes it holds.
func (c *chunk) run(at, n int64) (int64, block.ExtentState) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	state := c.state[at/block.Size]
	end := at + n
	for to := at; ; {
		to = (to/block.Size + 1) * block.Size
		if to >= end {
			return n, state
		}
		if c.state[to/block.Size] != state {
			return to - at, state
		}
	}
}
