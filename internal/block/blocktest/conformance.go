package blocktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"firn.io/firn/internal/block"
)

// Open returns a device of sizeBytes that reads as zero. It is closed by the
// test's Cleanup.
type Open func(t testing.TB, sizeBytes int64) block.Device

const (
	smallBytes = 12<<20 + 3*block.Size
	hugeBytes  = 16 << 40
)

// Run checks every sentence of block.Device's contract on devices that open
// returns, one per subtest.
func Run(t *testing.T, open func(t testing.TB, sizeBytes int64) block.Device) {
	for _, c := range []struct {
		name  string
		bytes int64
		f     func(*subject)
	}{
		{"Geometry", smallBytes, (*subject).geometry},
		{"Unaligned", smallBytes, (*subject).unaligned},
		{"BufferIsTheCallers", smallBytes, (*subject).bufferIsTheCallers},
		{"OutOfRange", smallBytes, (*subject).outOfRange},
		{"Canceled", smallBytes, (*subject).canceled},
		{"Flags", smallBytes, (*subject).flags},
		{"Zeroing", smallBytes, (*subject).zeroing},
		{"Extents", smallBytes, (*subject).extents},
		{"Random", smallBytes, (*subject).random},
		{"HugeTrim", hugeBytes, (*subject).hugeTrim},
		{"OverlapIsBlockByBlock", smallBytes, (*subject).overlap},
		{"AnsweredIsSeen", smallBytes, (*subject).answeredIsSeen},
		{"NeighboursAreKept", smallBytes, (*subject).neighbours},
		{"Lending", smallBytes, (*subject).lending},
		{"Prefetch", smallBytes, (*subject).prefetch},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := &subject{T: t, ctx: t.Context(), dev: open(t, c.bytes), size: c.bytes}
			c.f(s)
		})
	}
}

// long multiplies what FIRN_TEST_LONG=1 makes longer.
func long(n int) int {
	if os.Getenv("FIRN_TEST_LONG") != "" {
		return n * 20
	}
	return n
}

// subject is the device under test.
type subject struct {
	*testing.T
	ctx  context.Context
	dev  block.Device
	size int64
}

func (s *subject) must(err error, what string, args ...any) {
	s.Helper()
	if err != nil {
		s.Fatalf("%s: %v", fmt.Sprintf(what, args...), err)
	}
}

func (s *subject) kind(err error, want block.Kind, what string, args ...any) {
	s.Helper()
	switch {
	case err == nil:
		s.Errorf("%s succeeded, want kind %q", fmt.Sprintf(what, args...), want)
	case !errors.Is(err, want):
		s.Errorf("%s: kind %q (%v), want %q", fmt.Sprintf(what, args...), block.KindOf(err), err, want)
	}
}

func (s *subject) write(p []byte, off int64) {
	s.Helper()
	s.must(s.dev.WriteAt(s.ctx, p, off, 0), "write of %d bytes at %d", len(p), off)
}

func (s *subject) read(off int64, n int) []byte {
	s.Helper()
	p := bytes.Repeat([]byte{0xee}, n)
	s.must(s.dev.ReadAt(s.ctx, p, off), "read of %d bytes at %d", n, off)
	return p
}

// reads checks what the device has at off.
func (s *subject) reads(want []byte, off int64) {
	s.Helper()
	if got := s.read(off, len(want)); !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		s.Fatalf("read of %d bytes at %d: byte %d is %#x, want %#x", len(want), off, off+int64(i), got[i], want[i])
	}
}

func pattern(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = seed + byte(i) + byte(i>>8)*3 + byte(i>>16)*7
	}
	return p
}

func (s *subject) geometry() {
	g := s.dev.Geometry()
	if g.SizeBytes != s.size {
		s.Errorf("size is %d, want %d", g.SizeBytes, s.size)
	}
	if g.LogicalBlockBytes != 512 && g.LogicalBlockBytes != 4096 {
		s.Errorf("logical block of %d bytes", g.LogicalBlockBytes)
	} else if g.SizeBytes%int64(g.LogicalBlockBytes) != 0 {
		s.Errorf("size %d is no multiple of the logical block of %d", g.SizeBytes, g.LogicalBlockBytes)
	}
	if g.PreferredBytes < g.LogicalBlockBytes || g.PreferredBytes&(g.PreferredBytes-1) != 0 {
		s.Errorf("preferred block of %d bytes", g.PreferredBytes)
	}
	if g.MaxBytes < 64<<10 {
		s.Errorf("at most %d bytes in one request", g.MaxBytes)
	}
	if g.ReadOnly {
		s.Errorf("is read-only")
	}
	s.reads(make([]byte, block.Size), 0)
	s.reads(make([]byte, block.Size), s.size-block.Size)
	big := min(g.MaxBytes, int(s.size))
	s.write(pattern(big, 1), 0)
	s.reads(pattern(big, 1), 0)
}

// unaligned covers a byte, edges of sectors, blocks and chunks, and the end.
func (s *subject) unaligned() {
	model := make([]byte, s.size)
	seed := byte(0)
	for _, base := range []int64{0, block.Size, 64 << 10, 1 << 20, block.ChunkBytes, 2 * block.ChunkBytes, s.size} {
		for _, before := range []int64{0, 1, 511, 512, 4095, 4096, 4097, 9000} {
			for _, n := range []int64{1, 512, 4095, 4096, 4097, 12288, 20001} {
				off := base - before
				if off < 0 || off+n > s.size {
					continue
				}
				if seed++; seed%3 != 0 && n != 1 {
					continue
				}
				p := pattern(int(n), seed)
				s.write(p, off)
				copy(model[off:], p)
				s.reads(p, off)
				from, to := max(0, off-5000), min(s.size, off+n+5000)
				s.reads(model[from:to], from)
			}
		}
	}
	for off := int64(0); off <= s.size; off += block.ChunkBytes {
		s.must(s.dev.ReadAt(s.ctx, nil, off), "empty read at %d", off)
		s.must(s.dev.WriteAt(s.ctx, nil, off, 0), "empty write at %d", off)
		s.must(s.dev.Trim(s.ctx, off, 0, 0), "empty trim at %d", off)
		s.must(s.dev.WriteZeroes(s.ctx, off, 0, 0), "empty write of zeroes at %d", off)
	}
	for off := int64(0); off < s.size; off += 1 << 20 {
		s.reads(model[off:min(s.size, off+1<<20)], off)
	}
}

func (s *subject) bufferIsTheCallers() {
	p := pattern(9000, 3)
	keep := bytes.Clone(p)
	s.write(p, 1000)
	if !bytes.Equal(p, keep) {
		s.Errorf("a write changed its buffer")
	}
	clear(p)
	s.reads(keep, 1000)
	got := s.read(1000, 9000)
	clear(got)
	s.reads(keep, 1000)
	s.write(pattern(9000, 4), 1000)
	if !bytes.Equal(got, make([]byte, 9000)) {
		s.Errorf("a later write reached a buffer that was read into")
	}
}

func (s *subject) outOfRange() {
	p := pattern(block.Size, 1)
	s.write(p, s.size-block.Size)
	for _, c := range []struct{ off, n int64 }{
		{-1, 1}, {-block.Size, block.Size}, {s.size, 1}, {s.size - 1, 2}, {s.size - block.Size, 2 * block.Size},
		{s.size + block.Size, block.Size}, {math.MaxInt64, 1}, {math.MaxInt64 - 511, 512}, {math.MinInt64, 4096},
	} {
		buf := make([]byte, c.n)
		s.kind(s.dev.ReadAt(s.ctx, buf, c.off), block.OutOfRange, "read of %d at %d", c.n, c.off)
		s.kind(s.dev.WriteAt(s.ctx, buf, c.off, 0), block.OutOfRange, "write of %d at %d", c.n, c.off)
	}
	for _, c := range []struct{ off, n int64 }{
		{-1, 1}, {s.size, 1}, {0, s.size + 1}, {s.size - 1, 2}, {1, math.MaxInt64}, {math.MaxInt64, math.MaxInt64}, {-5, 10},
	} {
		s.kind(s.dev.Trim(s.ctx, c.off, c.n, 0), block.OutOfRange, "trim of %d at %d", c.n, c.off)
		s.kind(s.dev.WriteZeroes(s.ctx, c.off, c.n, 0), block.OutOfRange, "write of %d zeroes at %d", c.n, c.off)
		_, err := s.dev.Extents(s.ctx, nil, c.off, c.n, 8)
		s.kind(err, block.OutOfRange, "extents of %d at %d", c.n, c.off)
	}
	s.reads(p, s.size-block.Size)
}

func (s *subject) canceled() {
	p := pattern(block.Size, 1)
	s.write(p, 0)
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	s.kind(s.dev.ReadAt(ctx, make([]byte, 512), 0), block.Canceled, "read")
	s.kind(s.dev.WriteAt(ctx, p, block.Size, 0), block.Canceled, "write")
	s.kind(s.dev.Flush(ctx), block.Canceled, "flush")
	s.kind(s.dev.Trim(ctx, 8192, 4096, 0), block.Canceled, "trim")
	s.kind(s.dev.WriteZeroes(ctx, 8192, 4096, 0), block.Canceled, "write of zeroes")
	_, err := s.dev.Extents(ctx, nil, 0, 4096, 1)
	s.kind(err, block.Canceled, "extents")
	s.reads(p, 0)
	// A canceled operation may take effect, and does not poison its blocks.
	s.write(pattern(block.Size, 9), block.Size)
	s.reads(pattern(block.Size, 9), block.Size)
}

func (s *subject) flags() {
	s.must(s.dev.Flush(s.ctx), "flush of a new device")
	p := pattern(5000, 1)
	s.must(s.dev.WriteAt(s.ctx, p, 3000, block.FUA), "write with FUA")
	s.reads(p, 3000)
	s.must(s.dev.Flush(s.ctx), "flush")
	s.must(s.dev.Trim(s.ctx, 3000, 1000, block.FUA), "trim with FUA")
	s.must(s.dev.WriteZeroes(s.ctx, 4000, 1000, block.FUA|block.NoHole), "write of zeroes with FUA and NoHole")
	clear(p[:2000])
	s.reads(p, 3000)
	if err := s.dev.WriteZeroes(s.ctx, 5000, 1000, block.FastZero); err == nil {
		clear(p[2000:3000])
	} else {
		s.kind(err, block.Unsupported, "fast write of zeroes")
	}
	s.reads(p, 3000)
	s.must(s.dev.Flush(s.ctx), "flush after all")
}

// zeroing: trims and zeroes of all alignments keep what is beside them.
func (s *subject) zeroing() {
	const span = 64 << 10
	for _, base := range []int64{0, block.ChunkBytes - span/2} {
		for i, c := range []struct{ off, n int64 }{
			{0, span}, {1, 1}, {100, 4000}, {0, 4096}, {4095, 2}, {4096, 8192}, {5000, 20000}, {1, span - 2}, {span - 1, 1},
		} {
			model := pattern(span, byte(i))
			s.write(model, base)
			if i%2 == 0 {
				s.must(s.dev.Trim(s.ctx, base+c.off, c.n, 0), "trim")
			} else {
				s.must(s.dev.WriteZeroes(s.ctx, base+c.off, c.n, 0), "write of zeroes")
			}
			clear(model[c.off : c.off+c.n])
			s.reads(model, base)
			// Data written over zeroes is data again.
			s.write(model[:600], base+300)
			copy(model[300:], bytes.Clone(model[:600]))
			s.reads(model, base)
		}
	}
}

func (s *subject) extents() {
	s.checkExtents(0, s.size, make([]byte, s.size))
	model := make([]byte, s.size)
	for i := int64(0); i < 40; i++ {
		off := i * 5 * block.Size
		p := pattern(2*block.Size, byte(i)|1)
		s.write(p, off)
		copy(model[off:], p)
	}
	s.must(s.dev.Trim(s.ctx, 0, block.Size, 0), "trim")
	s.must(s.dev.WriteZeroes(s.ctx, 25*block.Size, block.Size, block.NoHole), "write of zeroes")
	clear(model[:block.Size])
	clear(model[25*block.Size:][:block.Size])
	s.checkExtents(0, s.size, model)
	s.checkExtents(1, 3*block.Size, model)
	s.checkExtents(block.ChunkBytes-7, 14, model)
	s.checkExtents(s.size-1, 1, model)

	prefix := []block.Extent{{Bytes: 1, State: block.Zero}}
	got, err := s.dev.Extents(s.ctx, prefix, 0, s.size, 1)
	s.must(err, "one extent")
	if len(got) != 2 || got[0] != prefix[0] || got[1].Bytes <= 0 || got[1].Bytes > s.size {
		s.Errorf("one extent after a prefix: %v", got)
	}
	got, err = s.dev.Extents(s.ctx, nil, block.Size, 30*block.Size, 3)
	s.must(err, "three extents")
	if len(got) == 0 || len(got) > 3 {
		s.Errorf("%d extents, want 1 to 3", len(got))
	}
}

// checkExtents reads the map of [off, off+n) in steps and compares it with the
// model: holes and zeroes read as zero, neighbours differ, all is covered.
func (s *subject) checkExtents(off, n int64, model []byte) {
	s.Helper()
	for end := off + n; off < end; {
		got, err := s.dev.Extents(s.ctx, nil, off, end-off, 7)
		s.must(err, "extents of %d bytes at %d", end-off, off)
		if len(got) == 0 || len(got) > 7 {
			s.Fatalf("extents at %d: %d of at most 7", off, len(got))
		}
		for i, e := range got {
			if e.Bytes <= 0 || e.Bytes > end-off {
				s.Fatalf("extent at %d has %d of %d bytes", off, e.Bytes, end-off)
			}
			if i > 0 && got[i-1].State == e.State {
				s.Errorf("extents at %d are not merged: %v", off, got)
			}
			if e.State != block.Data && len(bytes.Trim(model[off:off+e.Bytes], "\x00")) != 0 {
				s.Errorf("extent at %d of %d bytes in state %d holds data", off, e.Bytes, e.State)
			}
			off += e.Bytes
		}
		if len(got) < 7 && off != end {
			s.Fatalf("extents stop at %d, %d before the end", off, end-off)
		}
	}
}

// random compares a long run of operations with a slice of bytes. A failure
// names its seed.
func (s *subject) random() {
	for seed := range uint64(long(3)) {
		if !s.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			sub := &subject{t, s.ctx, s.dev, s.size}
			sub.must(sub.dev.Trim(sub.ctx, 0, sub.size, 0), "trim of all")
			sub.randomOps(rand.New(rand.NewPCG(seed, 1)), 150)
		}) {
			return
		}
	}
}

func (s *subject) randomOps(rnd *rand.Rand, ops int) {
	model := make([]byte, s.size)
	edges := []int64{0, block.Size, 64 << 10, block.ChunkBytes, 2 * block.ChunkBytes, s.size - 100<<10}
	for range ops {
		off := min(edges[rnd.IntN(len(edges))]+rnd.Int64N(64<<10), s.size-1)
		n := 1 + rnd.Int64N([]int64{1, 512, 5000, 40 << 10, 300 << 10}[rnd.IntN(5)])
		if rnd.IntN(2) == 0 {
			off, n = off&^(block.Size-1), (n+block.Size-1)&^(block.Size-1)
		}
		n = min(n, s.size-off)
		part := model[off : off+n]
		switch rnd.IntN(10) {
		case 0, 1, 2, 3:
			p := pattern(int(n), byte(rnd.Uint32()))
			s.must(s.dev.WriteAt(s.ctx, p, off, block.Flags(rnd.IntN(2))*block.FUA), "write of %d bytes at %d", n, off)
			copy(part, p)
		case 4:
			s.must(s.dev.Trim(s.ctx, off, n, 0), "trim of %d bytes at %d", n, off)
			clear(part)
		case 5:
			s.must(s.dev.WriteZeroes(s.ctx, off, n, block.Flags(rnd.IntN(2))*block.NoHole), "%d zeroes at %d", n, off)
			clear(part)
		case 6:
			s.checkExtents(off, n, model)
		case 7:
			s.must(s.dev.Flush(s.ctx), "flush")
		default:
			s.reads(part, off)
		}
	}
	for off := int64(0); off < s.size; off += 1 << 20 {
		s.reads(model[off:min(s.size, off+1<<20)], off)
	}
}

// hugeTrim: what a trim costs does not depend on how much it covers.
func (s *subject) hugeTrim() {
	at := []int64{0, 1<<30 + 12345, hugeBytes / 2, hugeBytes - 8192}
	for round := range 2 {
		for i, off := range at {
			s.write(pattern(8192, byte(i)), off)
		}
		if round == 0 {
			s.must(s.dev.Trim(s.ctx, 0, s.size, 0), "trim of all")
		} else {
			s.must(s.dev.WriteZeroes(s.ctx, 0, s.size, 0), "zeroes over all")
		}
		for _, off := range at {
			s.reads(make([]byte, 8192), off)
		}
	}
	s.write(pattern(8192, 1), 1<<40-4096)
	s.must(s.dev.Trim(s.ctx, 1, s.size-2, 0), "trim of all but two bytes")
	s.reads(make([]byte, 8192), 1<<40-4096)
	got, err := s.dev.Extents(s.ctx, nil, 0, s.size, 64)
	s.must(err, "extents of all")
	if len(got) == 0 {
		s.Errorf("no extents")
	}
}

// overlap: of overlapping writes each block holds one, whole.
func (s *subject) overlap() {
	const writers, blocks = 4, 24
	base := int64(block.ChunkBytes - blocks/2*block.Size)
	var wg sync.WaitGroup
	var failed sync.Once
	fail := func(format string, args ...any) { failed.Do(func() { s.Errorf(format, args...) }) }
	uniform := func(p []byte) bool {
		return bytes.Count(p, p[:1]) == len(p)
	}
	for w := range writers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 2))
			for i := range long(30) {
				at, n := rnd.IntN(blocks), 1+rnd.IntN(8)
				n = min(n, blocks-at)
				off := base + int64(at)*block.Size
				switch {
				case i%10 == 9:
					if err := s.dev.Trim(s.ctx, off, int64(n)*block.Size, 0); err != nil {
						fail("trim: %v", err)
					}
				default:
					p := bytes.Repeat([]byte{byte(w*60 + i%60 + 1)}, n*block.Size)
					if err := s.dev.WriteAt(s.ctx, p, off, 0); err != nil {
						fail("write: %v", err)
					}
				}
			}
		})
	}
	for r := range 2 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(r), 3))
			p := make([]byte, 4*block.Size)
			for range long(60) {
				off := base + int64(rnd.IntN(blocks-4))*block.Size
				if err := s.dev.ReadAt(s.ctx, p, off); err != nil {
					fail("read: %v", err)
				}
				for i := 0; i < len(p); i += block.Size {
					if !uniform(p[i : i+block.Size]) {
						fail("a read saw half of a write in the block at %d", off+int64(i))
					}
				}
			}
		})
	}
	wg.Wait()
	all := s.read(base, blocks*block.Size)
	for i := 0; i < len(all); i += block.Size {
		if !uniform(all[i : i+block.Size]) {
			s.Errorf("the block at %d is torn", base+int64(i))
		}
	}
}

// answeredIsSeen: each goroutine owns a block, hands over its newest content to
// a reader that must see it or a newer one.
func (s *subject) answeredIsSeen() {
	var wg sync.WaitGroup
	for g := range 4 {
		answered := make(chan byte, 1)
		off := int64(g)*3*block.Size + 100
		wg.Go(func() {
			defer close(answered)
			for i := range long(25) {
				p := bytes.Repeat([]byte{byte(i + 1)}, 3000)
				if err := s.dev.WriteAt(s.ctx, p, off, 0); err != nil {
					s.Errorf("write: %v", err)
					return
				}
				answered <- byte(i + 1)
			}
		})
		wg.Go(func() {
			p := make([]byte, 3000)
			for v := range answered {
				if err := s.dev.ReadAt(s.ctx, p, off); err != nil {
					s.Errorf("read: %v", err)
				} else if d := p[0] - v; d > 100 {
					s.Errorf("read %d after %d was answered", p[0], v)
				}
			}
		})
	}
	wg.Wait()
}

// neighbours: small writes side by side in one block, all at once, lose nothing.
func (s *subject) neighbours() {
	const writers, each = 8, 500
	base := int64(block.ChunkBytes - 2000)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range long(10) {
				p := bytes.Repeat([]byte{byte(w*16 + i%16 + 1)}, each)
				if err := s.dev.WriteAt(s.ctx, p, base+int64(w)*each, 0); err != nil {
					s.Errorf("write: %v", err)
				}
			}
		})
	}
	wg.Wait()
	want := make([]byte, 0, writers*each)
	for w := range writers {
		want = append(want, bytes.Repeat([]byte{byte(w*16 + (long(10)-1)%16 + 1)}, each)...)
	}
	s.reads(want, base)
	s.reads(make([]byte, 96), base-96)
	s.reads(make([]byte, 96), base+writers*each)
}

// lending: a Device that lends memory lends what a read would give, and does
// not change it before Release.
func (s *subject) lending() {
	m, ok := s.dev.(block.MemoryReader)
	if !ok {
		return
	}
	old := pattern(2*block.Size, 1)
	s.write(old, 4096)
	s.reads(old, 4096)
	var lent []block.Lent
	for _, c := range []struct{ off, n int64 }{{4096, 4096}, {4096, 8192}, {5000, 1}, {4608, 512}, {4096 + 100, 8000}} {
		l, ok := m.ReadMemory(c.off, int(c.n))
		if !ok {
			continue
		}
		if !bytes.Equal(l.Bytes(), old[c.off-4096:][:c.n]) {
			s.Errorf("lent other bytes than were written at %d", c.off)
		}
		lent = append(lent, l)
	}
	kept := make([][]byte, len(lent))
	for i, l := range lent {
		kept[i] = bytes.Clone(l.Bytes())
	}
	s.write(pattern(2*block.Size, 77), 4096)
	s.must(s.dev.Trim(s.ctx, 4096, 4096, 0), "trim")
	for i, l := range lent {
		if !bytes.Equal(l.Bytes(), kept[i]) {
			s.Errorf("lent bytes changed before their release")
		}
		l.Release()
	}
	if l, ok := m.ReadMemory(4096, 4096); ok {
		if !bytes.Equal(l.Bytes(), make([]byte, 4096)) {
			s.Errorf("lent bytes that were trimmed")
		}
		l.Release()
	}
	for _, off := range []int64{s.size, s.size - 100, -1, math.MaxInt64 - 4095} {
		if l, ok := m.ReadMemory(off, 4096); ok {
			s.Errorf("lent 4096 bytes at %d of %d", off, s.size)
			l.Release()
		}
	}
}

func (s *subject) prefetch() {
	d, ok := s.dev.(block.Prefetcher)
	if !ok {
		return
	}
	p := pattern(20000, 5)
	s.write(p, 1000)
	s.must(d.Prefetch(s.ctx, 0, s.size), "prefetch of all")
	s.must(d.Prefetch(s.ctx, 1001, 5), "prefetch of five bytes")
	s.reads(p, 1000)
	s.kind(d.Prefetch(s.ctx, s.size, 1), block.OutOfRange, "prefetch beyond the end")
}

// RunReadOnly checks a device that refuses changes; it must hold want at 0.
func RunReadOnly(t *testing.T, dev block.Device, want []byte) {
	s := &subject{t, t.Context(), dev, dev.Geometry().SizeBytes}
	if !dev.Geometry().ReadOnly {
		t.Errorf("the geometry does not say read-only")
	}
	s.kind(dev.WriteAt(s.ctx, pattern(4096, 1), 0, 0), block.ReadOnly, "write")
	s.kind(dev.Trim(s.ctx, 0, 4096, 0), block.ReadOnly, "trim")
	s.kind(dev.WriteZeroes(s.ctx, 0, 4096, 0), block.ReadOnly, "write of zeroes")
	s.must(dev.Flush(s.ctx), "flush")
	s.reads(want, 0)
	s.checkExtents(0, int64(len(want)), want)
}
