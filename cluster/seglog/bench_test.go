package seglog

import (
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

func BenchmarkAppend(b *testing.B) {
	for _, depth := range []int{1, 16, 64} {
		b.Run(map[int]string{1: "depth1", 16: "depth16", 64: "depth64"}[depth], func(b *testing.B) { benchAppend(b, depth) })
	}
}

func benchAppend(b *testing.B, depth int) {
	fs := vfs.NewOS()
	dir := b.TempDir()
	sb := Superblock{Disk: block.DiskID{1}, SegmentBytes: DefaultSegmentBytes}
	if err := Format(fs, dir, sb); err != nil {
		b.Fatal(err)
	}
	l, err := Open(fs, dir, sb, Options{CapacityBytes: 4 << 30})
	if err != nil {
		b.Fatal(err)
	}
	s := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer s.Stop()
	key := ReplicaKey{1, 1}
	p := payload.New(4096)
	data := make([]byte, 134)
	done := make(chan error, 1)
	s.Call(func() { l.Start(s, nil); l.Create(key, EntryID{10, 5}, HardState{}, func(err error) { done <- err }) })
	if err := <-done; err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.ResetTimer()
	s.Call(func() {
		r := l.Replica(key)
		sent, ended := 0, 0
		var next func()
		ack := func(err error) {
			if err != nil {
				b.Error(err)
			}
			ended++
			if sent < b.N {
				next()
			} else if ended == b.N {
				done <- nil
			}
		}
		next = func() {
			sent++
			w := Write{Entries: []Entry{{Term: 5, Index: r.LastIndex() + 1, Data: data, Payload: p}}}
			if sent%1024 == 0 && r.LastIndex() > r.FirstIndex()+2000 {
				w.Truncate = &EntryID{r.LastIndex() - 1000, 5}
			}
			r.Append(w, ack)
		}
		for range min(depth, b.N) {
			next()
		}
	})
	<-done
	b.StopTimer()
	s.Call(func() {
		st := l.Stats()
		b.ReportMetric(float64(st.Entries)/float64(st.Batches), "entries/batch")
		b.ReportMetric(float64(st.BatchBlocks*4096)/float64(st.PayloadBytes), "device/user")
		l.Close(func(err error) { done <- err })
	})
	<-done
	l2, err := Open(fs, dir, sb, Options{CapacityBytes: 4 << 30})
	if err != nil {
		b.Fatal(err)
	}
	if got := l2.Replica(key); got == nil || got.LastIndex() != uint64(10+b.N) {
		b.Fatalf("after reopen: %+v", got)
	}
}
