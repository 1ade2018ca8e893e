package gateway

import (
	"context"
	"testing"

	"firn.io/firn/internal/block"
)

// TestNeighbouringTrimsMerge discards a device as the kernel does: in requests
// of 4 GiB less a block, 32 at once.
func TestNeighbouringTrimsMerge(t *testing.T) {
	const step = 4<<30 - block.Size
	const size = 1 << 40
	w := newWorld(t, 1, size)
	data := make([]byte, 3*block.Size)
	data[0], data[len(data)-1] = 1, 1
	at := []int64{0, step - block.Size, 100*step + 512, size - int64(len(data))}
	left := len(at)
	for _, off := range at {
		w.v.WriteAsync(context.Background(), data, off, func(err error) {
			if left--; err != nil {
				t.Error(err)
			}
		})
	}
	w.until("the answer to the writes", func() bool { return left == 0 })
	var next int64
	requests, flight := 0, 0
	var send func()
	send = func() {
		for ; flight < 32 && next < size; requests++ {
			n := min(step, size-next)
			flight++
			w.v.ZeroAsync(context.Background(), next, n, func(err error) {
				if flight--; err != nil {
					t.Error(err)
				}
				send()
			})
			next += n
		}
	}
	send()
	w.until("the answer to the trims", func() bool { return flight == 0 && next == size })
	if marks := w.m.calls["mark"]; marks > requests/24 {
		t.Errorf("%d requests became %d marks", requests, marks)
	}
	if st := w.v.Stats(); st.Joins == 0 || st.Joined < 2*st.Joins || st.Joined > uint64(requests) {
		t.Errorf("of %d requests %d were joined into %d", requests, st.Joined, st.Joins)
	}
	for _, off := range at {
		p := make([]byte, len(data))
		if err := w.m.dev.ReadAt(t.Context(), p, off); err != nil || !allZero(p) {
			t.Errorf("bytes at %d are left, %v", off, err)
		}
	}
}

// TestMergedTrimsFailAlone lets the volume shrink while trims wait: those beyond
// the new end are refused, the others take effect.
func TestMergedTrimsFailAlone(t *testing.T) {
	const size = 1 << 30
	w := newWorld(t, 2, size)
	w.m.hold = true
	errs := map[int64]error{}
	trim := func(off, n int64) {
		w.v.ZeroAsync(context.Background(), off, n, func(err error) { errs[off] = err })
	}
	trim(0, mergeBytes)
	w.until("the first trim", func() bool { return len(w.m.held) > 0 })
	trim(size/2-mergeBytes, mergeBytes)
	trim(size/2, mergeBytes)
	w.m.geom.SizeBytes = size / 2
	w.m.changed()
	w.m.releaseHeld()
	w.until("the answer to all trims", func() bool { return len(errs) == 3 })
	if errs[0] != nil || errs[size/2-mergeBytes] != nil {
		t.Errorf("trims within the volume: %v", errs)
	}
	if err := errs[size/2]; err == nil || block.KindOf(err) != block.OutOfRange {
		t.Errorf("a trim beyond the new end: %v", err)
	}
}

// TestTrimsEndWithTheVolume ends a volume while trims are gathered.
func TestTrimsEndWithTheVolume(t *testing.T) {
	w := newWorld(t, 4, 1<<30)
	answered := 0
	trim := func(off int64) {
		w.v.ZeroAsync(context.Background(), off, mergeBytes, func(error) { answered++ })
	}
	trim(0)
	trim(mergeBytes)
	w.until("the first trim", func() bool { return w.v.merger.gathering })
	trim(2 * mergeBytes)
	if answered != 1 || len(w.v.merger.queue) != 2 {
		t.Fatalf("%d answers, %d trims wait", answered, len(w.v.merger.queue))
	}
	w.v.Detach(func(error) {})
	if answered != 3 {
		t.Errorf("%d of 3 trims were answered when the volume had ended", answered)
	}
}

// TestMergedTrimFailsInParts lets the volume shrink while trims that are one
// already wait for a write.
func TestMergedTrimFailsInParts(t *testing.T) {
	const size = 1 << 30
	w := newWorld(t, 3, size)
	w.m.hold = true
	errs := map[int64]error{}
	done := func(at int64) func(error) { return func(err error) { errs[at] = err } }
	w.v.ZeroAsync(context.Background(), 0, mergeBytes, done(0))
	w.until("the first trim", func() bool { return len(w.m.held) == 1 })
	w.v.WriteAsync(context.Background(), make([]byte, block.Size), size/2-mergeBytes, done(1))
	w.until("the write", func() bool { return len(w.m.held) == 2 })
	w.v.ZeroAsync(context.Background(), size/2-mergeBytes, mergeBytes, done(2))
	w.v.ZeroAsync(context.Background(), size/2, mergeBytes, done(3))
	first := w.m.held[0]
	w.m.held = w.m.held[1:]
	first()
	w.until("the merged trims to wait", func() bool { return w.v.marks.waiting == 1 && len(w.v.merger.queue) == 0 })
	w.m.geom.SizeBytes = size / 2
	w.m.changed()
	w.m.releaseHeld()
	w.until("the answer to all", func() bool { return len(errs) == 4 })
	if errs[0] != nil || errs[1] != nil || errs[2] != nil {
		t.Errorf("what is within the volume: %v", errs)
	}
	if err := errs[3]; err == nil || block.KindOf(err) != block.OutOfRange {
		t.Errorf("a trim beyond the new end: %v", err)
	}
}
