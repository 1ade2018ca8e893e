package stamp_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/internal/clock"
	"firn.io/firn/test/stamp"
)

var volume = [16]byte{1}

func sectors(n int) []byte { return make([]byte, n*stamp.SectorBytes) }

func verdict(err error) stamp.Verdict {
	var f *stamp.Fault
	if errors.As(err, &f) {
		return f.Verdict
	}
	if err != nil {
		return stamp.Verdict(err.Error())
	}
	return ""
}

func TestVerdicts(t *testing.T) {
	type env struct {
		h        *stamp.History
		old, new []byte // two acknowledged writes of sectors 0..7, old then new
	}
	tests := []struct {
		name string
		read func(t *testing.T, e env) error
		want stamp.Verdict
	}{
		{"the newest", func(t *testing.T, e env) error { return e.h.BeginRead(0).Check(e.new) }, ""},
		{"an older one", func(t *testing.T, e env) error { return e.h.BeginRead(0).Check(e.old) }, stamp.Lost},
		{"an older one after the newer was read", func(t *testing.T, e env) error {
			if err := e.h.BeginRead(0).Check(e.new); err != nil {
				t.Fatal(err)
			}
			return e.h.BeginRead(0).Check(e.old)
		}, stamp.Resurrected},
		{"zeroes", func(t *testing.T, e env) error { return e.h.BeginRead(0).Check(sectors(8)) }, stamp.Lost},
		{"a neighbour", func(t *testing.T, e env) error { return e.h.BeginRead(1).Check(e.new[:512]) }, stamp.Misdirected},
		{"half and half", func(t *testing.T, e env) error {
			p := append(append([]byte{}, e.new[:256]...), e.old[256:512]...)
			return e.h.BeginRead(0).Check(p)
		}, stamp.Torn},
		{"the future", func(t *testing.T, e env) error {
			p := sectors(1)
			stamp.Stamp{Volume: volume, Seq: 99}.Put(p)
			return e.h.BeginRead(0).Check(p)
		}, stamp.Invented},
		{"another volume", func(t *testing.T, e env) error {
			p := sectors(1)
			stamp.Stamp{Volume: [16]byte{2}, Seq: 2}.Put(p)
			return e.h.BeginRead(0).Check(p)
		}, stamp.Misdirected},
		{"in flight: before", func(t *testing.T, e env) error {
			e.h.Begin(1, 0, 8, sectors(8))
			return e.h.BeginRead(0).Check(e.new)
		}, ""},
		{"in flight: after", func(t *testing.T, e env) error {
			p := sectors(8)
			e.h.Begin(1, 0, 8, p)
			return e.h.BeginRead(0).Check(p)
		}, ""},
		{"in flight: after, then before", func(t *testing.T, e env) error {
			p := sectors(8)
			e.h.Begin(1, 0, 8, p)
			if err := e.h.BeginRead(0).Check(p); err != nil {
				t.Fatal(err)
			}
			return e.h.BeginRead(0).Check(e.new)
		}, stamp.Resurrected},
		{"of unknown outcome, long after", func(t *testing.T, e env) error {
			p := sectors(8)
			e.h.Begin(1, 0, 8, p).Unknown()
			return e.h.BeginRead(0).Check(p)
		}, ""},
		{"a read that overlaps a write may return the old", func(t *testing.T, e env) error {
			r := e.h.BeginRead(0)
			e.h.Begin(1, 0, 8, sectors(8)).Acked()
			return r.Check(e.new)
		}, ""},
		{"a trim", func(t *testing.T, e env) error {
			e.h.Begin(1, 0, 8, nil).Acked()
			return e.h.BeginRead(0).Check(sectors(8))
		}, ""},
		{"data after a trim", func(t *testing.T, e env) error {
			e.h.Begin(1, 0, 8, nil).Acked()
			return e.h.BeginRead(0).Check(e.new)
		}, stamp.Lost},
		{"a refused write", func(t *testing.T, e env) error {
			p := sectors(8)
			e.h.Begin(1, 0, 8, p).Refused()
			return e.h.BeginRead(0).Check(p)
		}, stamp.Lost},
		{"never written", func(t *testing.T, e env) error { return e.h.BeginRead(100).Check(sectors(4)) }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := env{stamp.NewHistory(volume), sectors(8), sectors(8)}
			e.h.Begin(1, 0, 8, e.old).Acked()
			e.h.Begin(1, 0, 8, e.new).Acked()
			if got := verdict(tt.read(t, e)); got != tt.want {
				t.Errorf("verdict %q, want %q", got, tt.want)
			}
		})
	}
}

// plain adapts a block.Device; forget makes it answer writes that it drops.
type plain struct {
	block.Device
	forget func(off int64) bool
}

func (d plain) WriteAt(ctx context.Context, p []byte, off int64) error {
	if d.forget != nil && d.forget(off) {
		return nil
	}
	return d.Device.WriteAt(ctx, p, off, 0)
}
func (d plain) Trim(ctx context.Context, off, n int64) error {
	return d.Device.WriteZeroes(ctx, off, n, 0)
}

func TestLoadPassesAGoodDeviceAndCatchesABadOne(t *testing.T) {
	now := func() time.Duration { return time.Duration(clock.System{}.Now()) }
	o := stamp.Options{Seed: 1, Volume: volume, Sectors: 4096, ReadPercent: 50, TrimPercent: 5, ErrorsEnd: true}
	ctx, cancel := context.WithCancel(t.Context())
	l := stamp.NewLoad(o)
	good := plain{Device: blocktest.New(blocktest.Options{Bytes: o.Sectors * stamp.SectorBytes})}
	watched := plain{good.Device, func(int64) bool {
		if l.Operations() > 3000 {
			cancel()
		}
		return false
	}}
	if err := l.Run(ctx, watched, now); err != nil {
		t.Fatalf("a good device: %v", err)
	}
	if err := l.Verify(t.Context(), good); err != nil {
		t.Fatalf("a good device: %v", err)
	}
	if acked, _, checked := l.History().Counts(); acked < 500 || checked < 5000 {
		t.Fatalf("only %d writes and %d sectors checked", acked, checked)
	}

	n := 0
	o.Workers = 1
	bad := stamp.NewLoad(o)
	err := bad.Run(t.Context(), plain{blocktest.New(blocktest.Options{Bytes: o.Sectors * stamp.SectorBytes}), func(int64) bool { n++; return n%50 == 0 }}, now)
	if v := verdict(err); v != stamp.Lost && v != stamp.Resurrected {
		t.Fatalf("a device that drops writes: %v", err)
	}
}

// late is a device on which everything goes wrong in a way of its own.
type late struct {
	plain
	read  func(p []byte) error
	write func() error
}

func (d late) ReadAt(_ context.Context, p []byte, _ int64) error { return d.read(p) }
func (d late) WriteAt(context.Context, []byte, int64) error      { return d.write() }

// TestRunReturnsEveryFault: a wrong byte counts also if its read ends after the
// load was stopped, and an error also if it is about a time that is over.
func TestRunReturnsEveryFault(t *testing.T) {
	now := func() time.Duration { return 0 }
	ctx, stop := context.WithCancel(t.Context())
	err := stamp.NewLoad(stamp.Options{Volume: volume, Sectors: 64, ReadPercent: 100, Workers: 1}).Run(ctx, late{read: func(p []byte) error {
		stop()
		p[0] = 1
		return nil
	}}, now)
	if v := verdict(err); v != stamp.Torn {
		t.Errorf("a wrong byte after the stop: %v", err)
	}
	refused := fmt.Errorf("the server: %w", context.DeadlineExceeded)
	err = stamp.NewLoad(stamp.Options{Volume: volume, Sectors: 64, ErrorsEnd: true}).Run(t.Context(), late{write: func() error { return refused }}, now)
	if !errors.Is(err, refused) {
		t.Errorf("a write that failed: %v", err)
	}
}

// A write without an answer may be there or not; once it is over it takes no
// effect after a newer write has begun.
func TestLateWrite(t *testing.T) {
	for _, late := range []bool{false, true} {
		h := stamp.NewHistory(volume)
		old, latest := sectors(8), sectors(8)
		w := h.Begin(0, 0, 8, old)
		w.Unknown()
		w.Over()
		if !late {
			if err := h.BeginRead(0).Check(old); err != nil {
				t.Fatalf("it landed before it was over: %v", err)
			}
		}
		h.Begin(0, 0, 8, latest).Acked()
		if err := h.BeginRead(0).Check(latest); err != nil {
			t.Fatal(err)
		}
		want := stamp.Late
		if got := verdict(h.BeginRead(0).Check(old)); got != want {
			t.Errorf("verdict %q, want %q", got, want)
		}
	}
}
