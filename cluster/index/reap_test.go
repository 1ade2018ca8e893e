package index_test

import (
	"testing"

	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// TestReapManyMarkers: markers that stand side by side, as a client's trims of a
// large volume leave them, go by the dozens in one job, whatever they hide.
func TestReapManyMarkers(t *testing.T) {
	t.Parallel()
	const chunks = 240
	g := newGroup(t, memstore.New())
	g.want(wire.OutcomeApplied, fence(1, 1))
	for c := range block.Chunk(60) {
		cmd := g.next(write(1, 0, 0, 3))
		cmd.Chunk = c * 4
		g.want(wire.OutcomeApplied, cmd)
	}
	g.checkpoint()
	versions := make([]block.Version, chunks)
	for c := range block.Chunk(chunks) {
		versions[c] = g.want(wire.OutcomeApplied, g.next(wire.Command{Type: wire.CmdMark, Chunk: c, ToChunk: c + 1})).Version
	}
	g.checkpoint()
	if n := g.r.Pending().Markers; n != chunks {
		t.Fatalf("%d markers", n)
	}
	// Ten of the chunks are as much as this job may do, then the rest.
	g.do(g.r.StartReap(10))
	if n := g.r.Pending().Markers; n > chunks-36 || n < chunks-40 {
		t.Errorf("%d markers are left after ten extents", n)
	}
	jobs := 0
	for ; g.r.Pending().Markers > 0; jobs++ {
		g.do(g.r.StartReap(4096))
	}
	if jobs > 1 {
		t.Errorf("%d jobs", jobs)
	}
	g.checkpoint()
	g.flush()
	if n := g.db.LiveTotal(); n != 0 || g.r.Usage(vol) != 0 {
		t.Errorf("%d blocks live, usage %d", n, g.r.Usage(vol))
	}
	for c := range block.Chunk(chunks) {
		if v, _ := g.r.ChunkVersion(vol, c); v < versions[c] {
			t.Fatalf("chunk %d fell to version %v from %v", c, v, versions[c])
		}
	}
}
