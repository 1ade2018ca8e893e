package blocktest

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"firn.io/firn/internal/block"
)

const benchBytes = 64 << 20

// Bench measures random reads and writes of 4 KiB and 64 KiB by one caller and
// by 32, reads of what memory lends, and sequential 1 MiB.
func Bench(b *testing.B, open func(t testing.TB, sizeBytes int64) block.Device) {
	dev := open(b, benchBytes)
	fill := pattern(1<<20, 1)
	for off := int64(0); off < benchBytes; off += int64(len(fill)) {
		if err := dev.WriteAt(b.Context(), fill, off, 0); err != nil {
			b.Fatal(err)
		}
	}
	for _, n := range []int{4 << 10, 64 << 10} {
		for _, depth := range []int{1, 32} {
			b.Run(fmt.Sprintf("read/%dk/depth%d", n>>10, depth), func(b *testing.B) {
				run(b, n, depth, func(p []byte, off int64) error { return dev.ReadAt(b.Context(), p, off) })
			})
			b.Run(fmt.Sprintf("write/%dk/depth%d", n>>10, depth), func(b *testing.B) {
				run(b, n, depth, func(p []byte, off int64) error { return dev.WriteAt(b.Context(), p, off, 0) })
			})
		}
	}
	b.Run("sequential/read", func(b *testing.B) {
		sequential(b, func(p []byte, off int64) error { return dev.ReadAt(b.Context(), p, off) })
	})
	b.Run("sequential/write", func(b *testing.B) {
		sequential(b, func(p []byte, off int64) error { return dev.WriteAt(b.Context(), p, off, 0) })
	})
	if m, ok := dev.(block.MemoryReader); ok {
		b.Run("lend/4k", func(b *testing.B) {
			lent := 0
			run(b, 4096, 1, func(_ []byte, off int64) error {
				if l, ok := m.ReadMemory(off, 4096); ok {
					lent++
					l.Release()
				}
				return nil
			})
			b.ReportMetric(float64(lent)/float64(b.N), "lent/op")
		})
	}
}

// run shares b.N operations among depth callers.
func run(b *testing.B, n, depth int, op func(p []byte, off int64) error) {
	b.ReportAllocs()
	b.SetBytes(int64(n))
	var left atomic.Int64
	left.Store(int64(b.N))
	done := make(chan error, depth)
	for w := range depth {
		go func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 4))
			p := make([]byte, n)
			for left.Add(-1) >= 0 {
				if err := op(p, rnd.Int64N(benchBytes/int64(n))*int64(n)); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range depth {
		if err := <-done; err != nil {
			b.Error(err)
		}
	}
}

func sequential(b *testing.B, op func(p []byte, off int64) error) {
	b.ReportAllocs()
	b.SetBytes(1 << 20)
	p := make([]byte, 1<<20)
	for i := range b.N {
		if err := op(p, int64(i)<<20%benchBytes); err != nil {
			b.Fatal(err)
		}
	}
}
