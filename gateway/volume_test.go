package gateway

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// system starts a loop and makes a volume over memory on it.
func system(t testing.TB, size int64) (*loop.System, *memory, *Volume) {
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	t.Cleanup(l.Stop)
	m := newMemory(t, l, size)
	var v *Volume
	l.Call(func() { v = NewVolume(l, m, Limits{}, nil) })
	return l, m, v
}

func TestConformance(t *testing.T) {
	blocktest.Run(t, func(t testing.TB, size int64) block.Device {
		_, _, v := system(t, size)
		return v
	})
}

func TestReadOnly(t *testing.T) {
	l, m, v := system(t, 1<<20)
	p := bytes.Repeat([]byte{5}, 9000)
	if err := v.WriteAt(t.Context(), p, 0, 0); err != nil {
		t.Fatal(err)
	}
	l.Call(func() { m.geom.ReadOnly = true; m.changed() })
	blocktest.RunReadOnly(t, v, p)
}

// world is a volume in the simulator: every step is drawn from the seed.
type world struct {
	*loop.World
	t *testing.T
	m *memory
	v *Volume
}

func newWorld(t *testing.T, seed uint64, size int64) *world {
	w := loop.NewWorld(seed)
	l := w.NewLoop(nil)
	m := newMemory(t, l, size)
	m.rand = w.Rand()
	return &world{World: w, t: t, m: m, v: NewVolume(l, m, Limits{}, nil)}
}

func (w *world) until(what string, cond func() bool) {
	w.t.Helper()
	if !w.RunUntil(time.Hour, cond) {
		w.t.Fatalf("%s did not happen", what)
	}
}

// TestRandomOverlap keeps many overlapping changes in flight; memory checks W2.
// At the end each byte is that of the last answered change to it, or of one that
// was in flight beside it.
func TestRandomOverlap(t *testing.T) {
	for seed := range uint64(12) {
		const size = 9<<20 + 512
		w := newWorld(t, seed, size)
		rnd := rand.New(rand.NewPCG(seed, 1))
		// candidates[i] are the values that byte i may have.
		type change struct {
			off, n     int64
			value      byte
			begin, end int
		}
		var all []*change
		clock, flying := 0, 0
		for i := range 200 {
			c := &change{off: rnd.Int64N(size), value: byte(i%200 + 1), begin: clock, end: -1}
			c.n = 1 + rnd.Int64N([]int64{10, 5000, 300 << 10, 5 << 20}[rnd.IntN(4)])
			c.n = min(c.n, size-c.off)
			clock++
			flying++
			all = append(all, c)
			done := func(err error) {
				if err != nil {
					t.Errorf("seed %d: %v", seed, err)
				}
				clock++
				c.end = clock
				flying--
			}
			if rnd.IntN(3) == 0 {
				c.value = 0
				w.v.ZeroAsync(t.Context(), c.off, c.n, done)
			} else {
				w.v.WriteAsync(t.Context(), bytes.Repeat([]byte{c.value}, int(c.n)), c.off, done)
			}
			for range rnd.IntN(6) {
				w.Step()
			}
			w.until("room for another change", func() bool { return flying < 12 })
		}
		w.until("the end", func() bool { return flying == 0 })
		var got []byte
		for off := int64(0); off < size; off += 1 << 20 {
			ready := false
			w.v.ReadAsync(t.Context(), off, int(min(1<<20, size-off)), func(p []byte, err error) {
				if err != nil {
					t.Fatal(err)
				}
				got, ready = append(got, p...), true
			})
			w.until("read", func() bool { return ready })
		}
		for at := int64(0); at < size; at += 1 + rnd.Int64N(200) {
			last := 0 // when the newest change that surely won over earlier ones began
			for _, c := range all {
				if c.off <= at && at < c.off+c.n {
					last = max(last, c.begin)
				}
			}
			legal := false
			touched := false
			for _, c := range all {
				if c.off <= at && at < c.off+c.n {
					touched = true
					legal = legal || got[at] == c.value && c.end > last
				}
			}
			if touched && !legal || !touched && got[at] != 0 {
				t.Fatalf("seed %d: byte %d is %d", seed, at, got[at])
			}
		}
		if w.v.marks.held+w.v.marks.waiting+len(w.v.marks.last) != 0 {
			t.Fatalf("seed %d: claims are left", seed)
		}
	}
}

// TestClaimsAreGrantedInOrder: a claim also waits for earlier ones that wait.
func TestClaimsAreGrantedInOrder(t *testing.T) {
	var ms marks
	var order []int
	claim := func(id int, from, to uint64) *mark {
		m := &mark{span: span{from, to}}
		m.granted = func() { order = append(order, id) }
		ms.claim(m)
		return m
	}
	one := claim(1, 0, 1)
	two := claim(2, 0, 3)
	three := claim(3, 2, 4) // free, but behind 2
	four := claim(4, 4, 5)
	if len(order) != 2 || order[1] != 4 {
		t.Fatalf("granted %v", order)
	}
	ms.release(four)
	ms.release(one)
	if len(order) != 3 || order[2] != 2 {
		t.Fatalf("granted %v", order)
	}
	ms.release(two)
	ms.release(three)
	if len(order) != 4 || ms.held+ms.waiting+len(ms.last) != 0 {
		t.Fatalf("granted %v", order)
	}
}

// TestClaimsAgainstModel: claims hold exactly when no earlier one that is not
// released overlaps them, in the order in which they came; whatever is called from
// within granted.
func TestClaimsAgainstModel(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		var ms marks
		type claimed struct {
			mark
			holds, over bool
		}
		var all []*claimed // in the order in which they came
		var claim func(depth int)
		var release func(c *claimed)
		check := func() {
			t.Helper()
			held, waiting := 0, 0
			for i, c := range all {
				if c.over {
					continue
				}
				free := true
				for _, e := range all[:i] {
					free = free && (e.over || !e.overlaps(c.span))
				}
				if free != c.holds {
					t.Fatalf("seed %d: claim %d of %v holds: %v, may: %v", seed, i, c.span, c.holds, free)
				}
				if free {
					held++
				} else {
					waiting++
				}
			}
			if ms.held != held || ms.waiting != waiting {
				t.Fatalf("seed %d: %d held and %d waiting, counted %d and %d", seed, held, waiting, ms.held, ms.waiting)
			}
			for i, r := range ms.last {
				if r.from >= r.to || i > 0 && ms.last[i-1].to > r.from {
					t.Fatalf("seed %d: runs %v", seed, ms.last)
				}
			}
		}
		claim = func(depth int) {
			from := rnd.Uint64N(60)
			c := &claimed{mark: mark{span: span{from, from + 1 + rnd.Uint64N([]uint64{1, 4, 30}[rnd.IntN(3)])}}}
			c.granted = func() {
				c.holds = true
				switch rnd.IntN(6) {
				case 0:
					if depth < 3 {
						claim(depth + 1)
					}
				case 1:
					release(c)
				}
			}
			all = append(all, c)
			ms.claim(&c.mark)
		}
		release = func(c *claimed) {
			c.over = true
			ms.release(&c.mark)
		}
		for range 150 {
			if rnd.IntN(2) == 0 {
				claim(0)
			} else if n := len(all); n > 0 {
				if c := all[rnd.IntN(n)]; c.holds && !c.over {
					release(c)
				}
			}
			check()
		}
		for left := true; left; {
			left = false
			for _, c := range all {
				if c.holds && !c.over {
					release(c)
					left = true
				}
			}
		}
		if check(); ms.held+ms.waiting+len(ms.last) != 0 {
			t.Fatalf("seed %d: claims are left: %+v", seed, ms)
		}
	}
}

// BenchmarkClaimsBehindATrim: many small writes wait behind one large trim, while
// as many elsewhere come and go.
func BenchmarkClaimsBehindATrim(b *testing.B) {
	const waiting = 2048
	for range b.N {
		var ms marks
		trim := &mark{span: span{0, 1 << 32}, granted: func() {}}
		ms.claim(trim)
		writes := make([]mark, waiting)
		for i := range writes {
			w := &writes[i]
			w.span, w.granted = span{uint64(i * 7), uint64(i*7 + 8)}, func() {}
			ms.claim(w)
		}
		elsewhere := &mark{span: span{1 << 33, 1<<33 + 1}, granted: func() {}}
		for range waiting {
			ms.claim(elsewhere)
			ms.release(elsewhere)
		}
		ms.release(trim)
		for i := range writes {
			ms.release(&writes[i])
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/waiting, "ns/claim")
}

// TestOutcomeUnknownHoldsBlocks: a change whose caller gave up keeps its blocks
// until the backend has answered (W4).
func TestOutcomeUnknownHoldsBlocks(t *testing.T) {
	l, m, v := system(t, 1<<20)
	l.Call(func() { m.hold = true })
	ctx, cancel := context.WithCancel(t.Context())
	gaveUp := make(chan error, 1)
	go func() { gaveUp <- v.WriteAt(ctx, bytes.Repeat([]byte{1}, 8192), 0, 0) }()
	for held := 0; held == 0; {
		l.Call(func() { held = len(m.held) })
	}
	cancel()
	if err := <-gaveUp; !errors.Is(err, block.Canceled) {
		t.Fatalf("%v", err)
	}
	second := make(chan error, 1)
	go func() { second <- v.WriteAt(t.Context(), bytes.Repeat([]byte{2}, 4096), 4096, 0) }()
	// Another block is free meanwhile; and its answer shows that the second write
	// has had its chance to be sent.
	other := make(chan error, 1)
	go func() { other <- v.WriteAt(t.Context(), bytes.Repeat([]byte{3}, 4096), 16384, 0) }()
	waiting := func() (n, held int) {
		l.Call(func() { n, held = v.marks.waiting, len(m.held) })
		return n, held
	}
	for {
		if n, held := waiting(); n == 1 && held == 2 {
			break
		}
	}
	select {
	case err := <-second:
		t.Fatalf("the second write was answered: %v", err)
	default:
	}
	l.Call(func() { m.releaseHeld() })
	for _, c := range []chan error{second, other} {
		if err := <-c; err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, 4096)
	if err := v.ReadAt(t.Context(), got, 4096); err != nil || got[0] != 2 {
		t.Fatalf("%v: %d", err, got[0])
	}
	if v.Stats().Abandoned != 1 || v.Stats().Waited != 1 {
		t.Errorf("%+v", v.Stats())
	}
}

// TestEndedAttachment: after the end nothing is sent, and all is refused with
// the reason.
func TestEndedAttachment(t *testing.T) {
	l, m, v := system(t, 1<<20)
	fenced := block.Errorf(block.Fenced, "taken over")
	l.Call(func() { m.ended(fenced) })
	ctx := t.Context()
	_, err := v.Extents(ctx, nil, 0, 4096, 1)
	for _, err := range []error{err, v.WriteAt(ctx, make([]byte, 512), 0, 0), v.ReadAt(ctx, make([]byte, 512), 0),
		v.Flush(ctx), v.Trim(ctx, 0, 512, 0)} {
		if !errors.Is(err, block.Fenced) {
			t.Errorf("%v", err)
		}
	}
	if len(m.calls) != 0 {
		t.Errorf("calls: %v", m.calls)
	}
}

// TestErrorsOfPieces: a change fails if one of its pieces does, after all have answered.
func TestErrorsOfPieces(t *testing.T) {
	l, m, v := system(t, 8<<20)
	l.Call(func() { m.refuse = block.Errorf(block.NoSpace, "full") })
	err := v.WriteAt(t.Context(), make([]byte, 3<<20), 1<<19, 0)
	if !errors.Is(err, block.NoSpace) {
		t.Fatalf("%v", err)
	}
	l.Call(func() {
		m.refuse = nil
		if len(m.flight)+v.marks.held != 0 {
			t.Errorf("in flight: %v", m.flight)
		}
	})
	if err := v.WriteAt(t.Context(), make([]byte, 3<<20), 1<<19, 0); err != nil {
		t.Fatal(err)
	}
}

// TestGrowBesidePaddedWrite: a write that was prepared as one up to the end of
// the device must not clear what lies behind the old end after a grow.
func TestGrowBesidePaddedWrite(t *testing.T) {
	for name, do := range map[string]func(c *change, size int64){
		"write":       func(c *change, size int64) { c.prepareWrite(bytes.Repeat([]byte{1}, 700), size-700, size) },
		"zeroes":      func(c *change, size int64) { c.prepareZero(size-9000, 9000, size) },
		"small trim":  func(c *change, size int64) { c.prepareZero(size-100, 100, size) },
		"long write":  func(c *change, size int64) { c.prepareWrite(make([]byte, 20000), size-20000, size) },
		"whole chunk": func(c *change, size int64) { c.prepareZero(100, size-100, size) },
		"last chunk":  func(c *change, size int64) { c.prepareZero(4<<20, size-4<<20, size) },
	} {
		// The last block lies in a chunk of its own, or ends one.
		for _, size := range []int64{8<<20 + 1024, 8<<20 - 3072} {
			growBeside(t, name, size, do)
		}
	}
}

func growBeside(t *testing.T, name string, size int64, do func(c *change, size int64)) {
	t.Helper()
	w := newWorld(t, 1, size)
	c := &change{ctx: t.Context()}
	c.init(w.v)
	do(c, size)
	// Meanwhile the device grows and the new end is written.
	w.m.geom.SizeBytes = size + 2048
	w.m.changed()
	ended := 0
	w.v.WriteAsync(t.Context(), bytes.Repeat([]byte{9}, 2048), size, func(err error) { ended++ })
	w.until("write", func() bool { return ended == 1 })
	c.finish = func() { ended++ }
	c.start()
	w.until("padded change", func() bool { return ended == 2 })
	if c.err != nil {
		t.Fatalf("%s: %v", name, c.err)
	}
	w.v.ReadAsync(t.Context(), size-100, 2148, func(p []byte, err error) {
		ended++
		if want := bytes.Repeat([]byte{9}, 2048); err != nil || !bytes.Equal(p[100:], want) || p[99] == 9 {
			t.Errorf("%s: %v, the new end was lost", name, err)
		}
	})
	w.until("read", func() bool { return ended == 3 })
}

// TestZeroesAreFastAndTakeNoSpace: FAST_ZERO never fails, and neither with it nor
// with NO_HOLE are zeros written but at the ends (decision 8).
func TestZeroesAreFastAndTakeNoSpace(t *testing.T) {
	l, m, v := system(t, 64<<20)
	if err := v.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 64<<10), 0, 0); err != nil {
		t.Fatal(err)
	}
	for _, f := range []block.Flags{0, block.NoHole, block.FastZero, block.NoHole | block.FastZero | block.FUA} {
		var before, after int
		l.Call(func() { before = m.calls["write"] })
		if err := v.WriteZeroes(t.Context(), 100, 64<<20-200, f); err != nil {
			t.Fatalf("flags %b: %v", f, err)
		}
		l.Call(func() { after = m.calls["write"] })
		if after-before > 2 {
			t.Errorf("flags %b: %d writes", f, after-before)
		}
		extents, err := v.Extents(t.Context(), nil, 4096, 64<<20-8192, 64)
		for _, e := range extents {
			if e.State == block.Data {
				t.Errorf("flags %b: %v, %v", f, extents, err)
			}
		}
	}
}

func TestUnwrittenEdgesOfTrimsCostNothing(t *testing.T) {
	_, m, v := system(t, 8<<20)
	if err := v.Trim(t.Context(), 100, 8<<20-200, 0); err != nil {
		t.Fatal(err)
	}
	if m.calls["write"] != 0 || m.calls["mark"] != 0 || m.calls["zero"] != 2 {
		t.Errorf("%v", m)
	}
}

func TestNotifyResize(t *testing.T) {
	l, m, v := system(t, 1<<20)
	var got []int64
	stop := v.NotifyResize(func(g block.Geometry) { got = append(got, g.SizeBytes) })
	l.Call(func() { m.geom.SizeBytes = 2 << 20; m.changed() })
	stop()
	l.Call(func() { m.geom.SizeBytes = 3 << 20; m.changed() })
	if len(got) != 1 || got[0] != 2<<20 || v.Geometry().SizeBytes != 3<<20 {
		t.Errorf("%v", got)
	}
}

// TestBudget: what is in flight is bounded, counting abandoned operations, and
// one operation above the bound still goes through.
func TestBudget(t *testing.T) {
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	t.Cleanup(l.Stop)
	m := newMemory(t, l, 8<<20)
	var v *Volume
	l.Call(func() { v = NewVolume(l, m, Limits{BytesInFlight: 1 << 20}, nil); m.hold = true })
	ctx, cancel := context.WithCancel(t.Context())
	gaveUp := make(chan error, 1)
	go func() { gaveUp <- v.WriteAt(ctx, make([]byte, 4<<20), 0, 0) }()
	for held := 0; held < 4; {
		l.Call(func() { held = len(m.held) })
	}
	cancel()
	<-gaveUp
	ctx2, cancel2 := context.WithCancel(t.Context())
	go func() { gaveUp <- v.WriteAt(ctx2, make([]byte, 512), 6<<20, 0) }()
	cancel2()
	if err := <-gaveUp; !errors.Is(err, block.Canceled) {
		t.Fatalf("%v", err)
	}
	l.Call(func() { m.releaseHeld() })
	if err := v.WriteAt(t.Context(), make([]byte, 512), 6<<20, 0); err != nil {
		t.Fatal(err)
	}
}

// instant is a Backend that answers in the next turn and keeps nothing.
type instant struct {
	memory
	zero *payload.Buf
}

func (i *instant) Write(_ block.Chunk, _ block.Index, p *payload.Buf, _ []uint32, done func(error)) {
	p.Release()
	i.loop.Post(func() { done(nil) })
}

func (i *instant) Read(_ context.Context, _ block.Chunk, _ block.Index, count int, done func([]payload.Piece, error)) {
	i.loop.Post(func() { done([]payload.Piece{{Bytes: count * block.Size, Buf: i.zero.Retain()}}, nil) })
}

func BenchmarkWrite4K(b *testing.B) { benchmark(b, true) }
func BenchmarkRead4K(b *testing.B)  { benchmark(b, false) }

func benchmark(b *testing.B, write bool) {
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	b.Cleanup(l.Stop)
	i := &instant{memory: *newMemory(b, l, 1<<30), zero: payload.New(block.Size)}
	var v *Volume
	l.Call(func() { v = NewVolume(l, i, Limits{}, nil) })
	p := make([]byte, block.Size)
	b.SetBytes(block.Size)
	b.ReportAllocs()
	for n := int64(0); b.Loop(); n++ {
		var err error
		if off := n % 1000 * block.Size; write {
			err = v.WriteAt(b.Context(), p, off, 0)
		} else {
			err = v.ReadAt(b.Context(), p, off)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
