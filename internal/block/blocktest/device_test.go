package blocktest_test

import (
	"context"
	"errors"
	"sync"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
)

func open(_ testing.TB, size int64) block.Device {
	return blocktest.New(blocktest.Options{Bytes: size})
}

func TestConformance(t *testing.T) { blocktest.Run(t, open) }

func BenchmarkDevice(b *testing.B) { blocktest.Bench(b, open) }

func TestReadOnly(t *testing.T) {
	d := blocktest.New(blocktest.Options{Bytes: 1 << 20})
	want := []byte("kept")
	if err := d.WriteAt(t.Context(), want, 0, 0); err != nil {
		t.Fatal(err)
	}
	d.SetReadOnly(true)
	blocktest.RunReadOnly(t, d, append(want, make([]byte, 4092)...))
}

func TestResize(t *testing.T) {
	d := blocktest.New(blocktest.Options{Bytes: 10 << 20})
	var seen []int64
	stop := d.NotifyResize(func(g block.Geometry) { seen = append(seen, g.SizeBytes) })
	p := []byte{1, 2, 3, 4}
	for _, off := range []int64{0, 1<<20 - 2, 9 << 20} {
		if err := d.WriteAt(t.Context(), p, off, 0); err != nil {
			t.Fatal(err)
		}
	}
	d.Resize(1 << 20)
	if err := d.ReadAt(t.Context(), p, 1<<20); !errors.Is(err, block.OutOfRange) {
		t.Errorf("read beyond the shrunk end: %v", err)
	}
	d.Resize(16 << 20)
	stop()
	d.Resize(20 << 20)
	got := make([]byte, 4)
	for off, want := range map[int64][4]byte{0: {1, 2, 3, 4}, 1<<20 - 2: {1, 2, 0, 0}, 9 << 20: {}} {
		if err := d.ReadAt(t.Context(), got, off); err != nil || [4]byte(got) != want {
			t.Errorf("at %d after shrink and grow: %v %v, want %v", off, got, err, want)
		}
	}
	if len(seen) != 2 || seen[0] != 1<<20 || seen[1] != 16<<20 {
		t.Errorf("told of sizes %v", seen)
	}
}

func TestBefore(t *testing.T) {
	fail := block.Errorf(block.Corrupt, "rot")
	d := blocktest.New(blocktest.Options{Bytes: 1 << 20, Before: func(_ context.Context, op blocktest.Op, off, n int64) error {
		if op == blocktest.OpRead && off == 4096 {
			return fail
		}
		return nil
	}})
	p := make([]byte, 10)
	if err := d.ReadAt(t.Context(), p, 4096); !errors.Is(err, block.Corrupt) {
		t.Errorf("got %v", err)
	}
	if err := d.ReadAt(t.Context(), p, 0); err != nil {
		t.Errorf("got %v", err)
	}
}

// TestLoansUnderWrites: loans stay as they were lent while writers work on the
// same pages.
func TestLoansUnderWrites(t *testing.T) {
	d := blocktest.New(blocktest.Options{Bytes: 1 << 20})
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			p := make([]byte, 4096)
			for i := range 500 {
				for j := range p {
					p[j] = byte(w*2 + i%2)
				}
				if err := d.WriteAt(t.Context(), p, 4096, 0); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			for range 500 {
				l, ok := d.ReadMemory(4096, 4096)
				if !ok {
					t.Error("nothing lent")
					return
				}
				b := l.Bytes()
				first := b[0]
				for _, v := range b {
					if v != first {
						t.Error("a loan is torn")
						break
					}
				}
				l.Release()
			}
		})
	}
	wg.Wait()
	if n := d.Lent(); n != 0 {
		t.Errorf("%d loans left", n)
	}
}
