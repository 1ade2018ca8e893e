package vfs

import (
	"errors"
	"io"
	"math/rand/v2"
	"slices"

	"firn.io/firn/internal/block"
)

const (
	simSector = 512
	simPage   = 4096
)

// simData is the content of a simulated file: pages that were ever written with
// something else than zeros.
type simData struct {
	size        int64
	durableSize int64
	sizes       []int64 // lengths since the last sync, the newest excluded
	pages       map[int64]*page
	unsynced    map[int64]*page // those of pages that Sync must look at
}

// zeros is what a page holds on the disk that was never synced. It stays so.
var zeros [simPage]byte

// page is 4 KiB of a file: as it is on the disk, and what was written over it.
// A bit of mask is a sector. What durable and before point at is never changed:
// crashed disks share it.
type page struct {
	durable *[simPage]byte
	dirty   *[simPage]byte
	mask    uint8
	older   []version // versions of dirty sectors that were overwritten unsynced
	// lost is what a failed sync dropped: it is read, and never written.
	lost     *[simPage]byte
	lostMask uint8
	// before is what the disk had before the last sync that changed the page, if
	// that is kept.
	before *[simPage]byte
}

type version struct {
	bytes [simPage]byte
	mask  uint8
}

// sector returns what is read from sector i.
func (p *page) sector(i int) []byte {
	at := i * simSector
	switch {
	case p.mask>>i&1 != 0:
		return p.dirty[at : at+simSector]
	case p.lostMask>>i&1 != 0:
		return p.lost[at : at+simSector]
	}
	return p.durable[at : at+simSector]
}

func (p *page) write(off int, b []byte) {
	first, last := off/simSector, (off+len(b)-1)/simSector
	var touched uint8
	for i := first; i <= last; i++ {
		touched |= 1 << i
	}
	if p.dirty == nil {
		p.dirty = new([simPage]byte)
	}
	if again := touched & p.mask; again != 0 {
		p.older = append(p.older, version{*p.dirty, again})
	}
	for _, i := range []int{first, last} {
		// Sectors that are written in part keep the rest of what was there.
		copy(p.dirty[i*simSector:(i+1)*simSector], p.sector(i))
	}
	copy(p.dirty[off:], b)
	p.mask |= touched
}

// sync makes the dirty sectors durable.
func (p *page) sync(keep bool) {
	if p.mask == 0 {
		return
	}
	if keep {
		p.before = p.durable
	}
	if p.mask != 0xff {
		for i := range simPage / simSector {
			if p.mask>>i&1 == 0 {
				copy(p.dirty[i*simSector:(i+1)*simSector], p.durable[i*simSector:])
			}
		}
	}
	p.durable = p.dirty
	p.dirty, p.mask, p.older = nil, 0, nil
}

// survive returns what is on the disk after a crash: of each dirty sector any of
// its versions, or what was there before. nil keeps what was there before.
func (p *page) survive(r *rand.Rand) *[simPage]byte {
	if p.mask == 0 || r == nil {
		return p.durable
	}
	out := *p.durable
	for i := range simPage / simSector {
		if p.mask>>i&1 == 0 {
			continue
		}
		at := i * simSector
		var versions [][]byte
		for k := range p.older {
			if p.older[k].mask>>i&1 != 0 {
				versions = append(versions, p.older[k].bytes[at:at+simSector])
			}
		}
		versions = append(versions, p.dirty[at:at+simSector])
		if k := r.IntN(len(versions) + 1); k < len(versions) {
			copy(out[at:at+simSector], versions[k])
		}
	}
	return &out
}

// stale replaces what was read by what was there before.
func (d *simData) stale(b []byte, off int64) {
	for done := 0; done < len(b); {
		i, at := (off+int64(done))/simPage, int((off+int64(done))%simPage)
		step := min(len(b)-done, simPage-at)
		if p := d.pages[i]; p != nil && p.before != nil {
			copy(b[done:done+step], p.before[at:])
		} else {
			clear(b[done : done+step])
		}
		done += step
	}
}

func (d *simData) page(i int64) *page {
	p := d.pages[i]
	if p == nil {
		if d.pages == nil {
			d.pages = make(map[int64]*page)
		}
		p = &page{durable: &zeros}
		d.pages[i] = p
	}
	return p
}

func isZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

func (d *simData) read(b []byte, off int64) int {
	n := int(max(0, min(int64(len(b)), d.size-off)))
	for done := 0; done < n; {
		i, at := (off+int64(done))/simPage, int((off+int64(done))%simPage)
		step := min(n-done, simPage-at)
		if p := d.pages[i]; p == nil {
			clear(b[done : done+step])
		} else {
			for k := done; k < done+step; {
				o := at + k - done
				sector := p.sector(o / simSector)
				k += copy(b[k:done+step], sector[o%simSector:])
			}
		}
		done += step
	}
	return n
}

func (d *simData) write(b []byte, off int64) {
	for done := 0; done < len(b); {
		i, at := (off+int64(done))/simPage, int((off+int64(done))%simPage)
		step := min(len(b)-done, simPage-at)
		piece := b[done : done+step]
		if d.pages[i] != nil || !isZero(piece) {
			p := d.page(i)
			p.write(at, piece)
			d.mark(i, p)
		}
		done += step
	}
}

func (d *simData) mark(i int64, p *page) {
	if d.unsynced == nil {
		d.unsynced = make(map[int64]*page)
	}
	d.unsynced[i] = p
}

func (d *simData) resize(n int64) {
	if n == d.size {
		return
	}
	d.sizes = append(d.sizes, d.size)
	if n < d.size {
		// What is cut off reads as zero if the file grows again.
		for i, p := range d.pages {
			if end := n - i*simPage; end < simPage {
				at := int(max(0, end))
				p.write(at, make([]byte, simPage-at))
				d.mark(i, p)
			}
		}
	}
	d.size = n
}

func (d *simData) sync(keep bool) {
	for _, p := range d.unsynced {
		p.sync(keep)
	}
	d.unsynced = nil
	d.durableSize, d.sizes = d.size, nil
}

// failSync drops what was to be written: it stays readable, and a later sync
// does not know of it.
func (d *simData) failSync() {
	for _, p := range d.unsynced {
		if p.lost == nil {
			p.lost = new([simPage]byte)
		}
		for i := range simPage / simSector {
			if p.mask>>i&1 != 0 {
				copy(p.lost[i*simSector:(i+1)*simSector], p.sector(i))
			}
		}
		p.lostMask |= p.mask
		p.dirty, p.mask, p.older = nil, 0, nil
	}
	d.unsynced = nil
}

// survive returns the content after a crash.
func (d *simData) survive(r *rand.Rand) simData {
	out := simData{size: d.durableSize}
	if r != nil && (len(d.sizes) > 0 || d.size != d.durableSize) {
		all := append(slices.Clone(d.sizes), d.size, d.durableSize)
		out.size = all[r.IntN(len(all))]
	}
	out.durableSize = out.size
	indexes := make([]int64, 0, len(d.pages))
	for i := range d.pages {
		indexes = append(indexes, i)
	}
	slices.Sort(indexes)
	for _, i := range indexes {
		left := d.pages[i].survive(r)
		if end := out.size - i*simPage; end < simPage {
			cut := *left
			clear(cut[max(0, end):])
			left = &cut
		}
		if left != &zeros {
			out.page(i).durable = left
		}
	}
	return out
}

func (d *simData) rot(off, n int64) {
	for o := off; o < off+n; o++ {
		p := d.page(o / simPage)
		k := int(o % simPage)
		switch i := k / simSector; {
		case p.mask>>i&1 != 0:
			p.dirty[k] ^= 0xff
		case p.lostMask>>i&1 != 0:
			p.lost[k] ^= 0xff
		}
		rotten := *p.durable
		rotten[k] ^= 0xff
		p.durable = &rotten
	}
}

// simFile is an open file of a Sim.
type simFile struct {
	s        *Sim
	n        *node
	name     string
	readOnly bool
	closed   bool
	c        *counters
}

func (f *simFile) begin(c Call) error {
	c.Name = f.name
	if f.closed {
		return block.Errorf(block.Internal, "%s is used after it was closed", f.name)
	}
	for held := f.s.held; held != nil && f.s.held == held; {
		held.Wait()
	}
	return f.s.ask(c)
}

func (f *simFile) ReadAt(p []byte, off int64) (int, error) {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if err := f.begin(Call{Op: OpRead, Off: off, Len: len(p)}); err != nil {
		return 0, err
	}
	fault := ReadFault{}
	if f.s.readRule != nil {
		fault = f.s.readRule(Call{Op: OpRead, Name: f.name, Off: off, Len: len(p)})
	}
	if fault.Err != nil {
		return 0, fault.Err
	}
	n := f.n.file.read(p, off)
	if fault.Shift != 0 {
		clear(p[:n])
		f.n.file.read(p[:n], off+fault.Shift)
	}
	if fault.Stale {
		f.n.file.stale(p[:n], off)
	}
	f.c.read(n)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *simFile) WriteAt(p []byte, off int64) (int, error) { return f.WriteAtv([][]byte{p}, off) }

func (f *simFile) WriteAtv(bufs [][]byte, off int64) (int, error) {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	total := 0
	for _, b := range bufs {
		total += len(b)
	}
	if f.readOnly {
		return 0, block.Errorf(block.Denied, "write %s: opened for reading", f.name)
	}
	dead := f.s.dead
	err := f.begin(Call{Op: OpWrite, Off: off, Len: total})
	if part := (*Partial)(nil); errors.As(err, &part) {
		return f.writePart(bufs, off, min(part.Bytes, total), err)
	}
	if err != nil && (dead != nil || f.s.dead == nil) {
		return 0, err
	}
	if full := f.grow(off + int64(total)); full != nil {
		return 0, full
	}
	// A write that the loss of power cuts short is in the cache like any other:
	// the crash decides on each of its sectors.
	at := off
	for _, b := range bufs {
		f.n.file.write(b, at)
		at += int64(len(b))
	}
	if err != nil {
		return 0, err
	}
	f.c.wrote(total)
	return total, nil
}

// writePart writes the first n bytes of a write that then fails with err.
func (f *simFile) writePart(bufs [][]byte, off int64, n int, err error) (int, error) {
	if full := f.grow(off + int64(n)); full != nil {
		return 0, full
	}
	for done := 0; done < n; {
		b := bufs[0][:min(len(bufs[0]), n-done)]
		f.n.file.write(b, off+int64(done))
		done, bufs = done+len(b), bufs[1:]
	}
	f.c.wrote(n)
	return n, err
}

// grow makes room up to end.
func (f *simFile) grow(end int64) error {
	more := end - f.n.file.size
	if more <= 0 {
		return nil
	}
	if f.s.capacity > 0 && f.s.used+more > f.s.capacity {
		return block.Errorf(block.NoSpace, "write %s: no space left on the simulated disk", f.name)
	}
	f.s.used += more
	f.n.file.resize(end)
	return nil
}

func (f *simFile) Sync() error {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	f.c.syncs.Add(1)
	if err := f.begin(Call{Op: OpSync}); err != nil {
		if f.s.dead == nil {
			f.n.file.failSync()
		}
		return syncError(err, f.name)
	}
	f.n.file.sync(f.s.readRule != nil)
	return nil
}

func (f *simFile) Allocate(off, n int64) error {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if err := f.begin(Call{Op: OpSize, Off: off, Len: int(n)}); err != nil {
		return err
	}
	return f.grow(off + n)
}

func (f *simFile) Truncate(size int64) error {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if err := f.begin(Call{Op: OpSize, Off: size}); err != nil {
		return err
	}
	if size > f.n.file.size {
		return f.grow(size)
	}
	f.s.used -= f.n.file.size - size
	f.n.file.resize(size)
	return nil
}

func (f *simFile) Size() (int64, error) {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if f.s.dead != nil {
		return 0, f.s.dead
	}
	return f.n.file.size, nil
}

func (f *simFile) Direct() bool { return false }

func (f *simFile) DropCache() error { return nil }

func (f *simFile) Close() error {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if f.closed {
		return block.Errorf(block.Internal, "%s is closed twice", f.name)
	}
	f.closed = true
	return nil
}
