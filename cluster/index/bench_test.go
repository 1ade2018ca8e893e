package index_test

import (
	"math/rand/v2"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/cluster/index/pebblestore"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// The benchmarks run over one volume whose blocks are all written once, 4 KiB
// at a time: FIRN_BENCH_EXTENTS of them, 4 M by default ("small" in the design;
// 100 M is "big").
func benchExtents(b *testing.B) uint64 {
	if s := os.Getenv("FIRN_BENCH_EXTENTS"); s != "" {
		n, err := strconv.ParseUint(s, 10, 40)
		if err != nil {
			b.Fatal(err)
		}
		return n
	}
	return 4 << 20
}

// cpu is the processor time of the process so far, Pebble's work in the
// background included: what is measured while others use the machine.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func reportCPU(b *testing.B, name string, used time.Duration) {
	b.ReportMetric(float64(used.Nanoseconds())/float64(b.N), name)
}

const benchCheckpoint = 1 << 20 // updates

type bench struct {
	*group
	store   *pebblestore.Store
	extents uint64
	cmd     wire.Command
	crcs    [1]uint32
	index   uint64
	block   uint64 // of the log's segments
}

// loaded is kept between benchmarks: filling takes longer than measuring.
var loaded *bench

func load(b *testing.B) *bench {
	if loaded != nil {
		return loaded
	}
	b.StopTimer()
	dir, err := os.MkdirTemp("", "index-bench")
	if err != nil {
		b.Fatal(err)
	}
	store, err := pebblestore.Open(dir, pebblestore.Options{CacheBytes: 512 << 20})
	if err != nil {
		b.Fatal(err)
	}
	l := &bench{store: store, extents: benchExtents(b)}
	l.start(b, store)
	begin := time.Now()
	var merging time.Duration
	for i := range l.extents {
		l.writeAt(i)
		if i%benchCheckpoint == benchCheckpoint-1 || i == l.extents-1 {
			t := time.Now()
			l.checkpoint()
			l.flush()
			merging += time.Since(t)
		}
	}
	m := store.Metrics()
	b.Logf("filled with %d extents in %v, %v of it merging; the store takes %d bytes, %.1f per extent", l.extents,
		time.Since(begin).Round(time.Millisecond), merging.Round(time.Millisecond), m.DiskSpaceUsage(), float64(m.DiskSpaceUsage())/float64(l.extents))
	loaded = l
	b.StartTimer()
	return l
}

func (l *bench) start(b *testing.B, store index.Store) {
	l.group = newGroup(b, store)
	f := fence(1, 1)
	f.Size = block.MaxVolumeBytes
	l.want(wire.OutcomeApplied, f)
	l.index = firstIndex + 1
	l.cmd = wire.Command{Type: wire.CmdWrite, Volume: vol, Epoch: 1, Nonce: 1, Count: 1, PayloadBytes: block.Size}
	l.cmd.CRCs = l.crcs[:]
}

func (l *bench) writeAt(at uint64) {
	l.index++
	l.block++
	l.cmd.OpSeq++
	l.cmd.Floor = max(1, l.cmd.OpSeq-min(32, l.cmd.OpSeq))
	l.cmd.Chunk, l.cmd.Block = block.Chunk(at/block.BlocksPerChunk), block.Index(at%block.BlocksPerChunk)
	l.crcs[0] = uint32(at)
	res, err := l.r.Apply(l.index, 6, &l.cmd, seglog.Location{Segment: seglog.SegmentID(1 + l.block>>14), Block: uint16(l.block & (1<<14 - 1))})
	if err != nil || res.Outcome != wire.OutcomeApplied {
		l.t.Fatal(res.Outcome, err)
	}
}

// BenchmarkApply is random 4 KiB overwrites; merge-cpu-ns/op is what
// checkpoints of 1 M updates cost on top, flushes and compactions included, and
// index-B/op what Pebble wrote.
func BenchmarkApply(b *testing.B) {
	l := load(b)
	rng := rand.New(rand.NewPCG(1, 2))
	var applying time.Duration
	written, begin := l.written(), cpu()
	b.ReportAllocs()
	b.ResetTimer()
	for i := 0; i < b.N; {
		t := cpu()
		for range min(benchCheckpoint, b.N-i) {
			l.writeAt(rng.Uint64N(l.extents))
			i++
		}
		applying += cpu() - t
		b.StopTimer()
		if p := l.r.Pending(); p.Updates > benchCheckpoint/2 {
			b.ReportMetric(float64(p.Bytes)/float64(p.Updates), "delta-B/op")
		}
		l.checkpoint()
		l.flush()
		b.StartTimer()
	}
	b.StopTimer()
	reportCPU(b, "cpu-ns/op", applying)
	reportCPU(b, "merge-cpu-ns/op", cpu()-begin-applying)
	b.ReportMetric(float64(l.written()-written)/float64(b.N), "index-B/op")
}

// written is what flushes and compactions have written.
func (l *bench) written() uint64 {
	total := l.store.Metrics().Total()
	return total.TableBytesFlushed + total.TableBytesCompacted
}

func BenchmarkLookup(b *testing.B) {
	l := load(b)
	rng := rand.New(rand.NewPCG(3, 4))
	begin := cpu()
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		l.lookAt(b, rng.Uint64N(l.extents))
	}
	reportCPU(b, "cpu-ns/op", cpu()-begin)
}

func (l *bench) lookAt(b *testing.B, at uint64) {
	u := l.r.Lookup(index.Query{Volume: vol, Generation: block.GenerationLatest, Chunk: block.Chunk(at / block.BlocksPerChunk),
		Block: block.Index(at % block.BlocksPerChunk), Count: 1})
	if u.Pending() {
		if err := u.Load(); err != nil {
			b.Fatal(err)
		}
	}
	if u.Runs()[0].State != block.Data {
		b.Fatalf("block %d: %+v", at, u.Runs())
	}
	u.Release()
}

// BenchmarkLookupDelta is a look-up that memory answers.
func BenchmarkLookupDelta(b *testing.B) {
	l := &bench{extents: 1 << 20}
	l.start(b, memstore.New())
	rng := rand.New(rand.NewPCG(5, 6))
	for i := range l.extents {
		l.writeAt(i)
	}
	begin := cpu()
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		l.lookAt(b, rng.Uint64N(l.extents))
	}
	reportCPU(b, "cpu-ns/op", cpu()-begin)
}

// BenchmarkApplyDelta is apply alone, into a delta that grows to 1 M updates
// over 16 GiB.
func BenchmarkApplyDelta(b *testing.B) {
	rng := rand.New(rand.NewPCG(7, 8))
	var used time.Duration
	b.ReportAllocs()
	for i := 0; i < b.N; {
		b.StopTimer()
		l := &bench{}
		l.start(b, memstore.New())
		b.StartTimer()
		begin := cpu()
		for range min(benchCheckpoint, b.N-i) {
			l.writeAt(rng.Uint64N(4 << 20))
			i++
		}
		used += cpu() - begin
	}
	reportCPU(b, "cpu-ns/op", used)
}

// BenchmarkTrim16TiB is one range marker over 16 TiB of the loaded volume, and
// its chunk versions.
func BenchmarkTrim16TiB(b *testing.B) {
	l := &bench{}
	l.start(b, memstore.New())
	for i := range uint64(1 << 16) {
		l.writeAt(i * block.BlocksPerChunk)
	}
	trim := wire.Command{Type: wire.CmdMark, Volume: vol, Epoch: 1, Nonce: 1, ToChunk: 16 << 40 / block.ChunkBytes}
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		l.index++
		l.cmd.OpSeq++
		trim.OpSeq, trim.Floor = l.cmd.OpSeq, l.cmd.OpSeq
		if res, err := l.r.Apply(l.index, 6, &trim, seglog.Location{}); err != nil || res.Outcome != wire.OutcomeApplied {
			b.Fatal(res.Outcome, err)
		}
	}
}
