package node

import (
	"fmt"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// Digest is what Digests found of one replica.
type Digest struct {
	Group   block.GroupID
	Applied block.Version
	Sum     uint64
}

// Digests returns a checksum of what can be seen in each replica: replicas of a
// group that have applied the same entry have the same. It reads the index and
// blocks: it is for tests and audits of a small cluster, on the Loop.
func (n *Node) Digests() ([]Digest, error) {
	var out []Digest
	for _, rep := range n.sorted() {
		sum, err := rep.state.Digest()
		if err != nil {
			return nil, err
		}
		out = append(out, Digest{rep.key.Group, rep.state.AppliedVersion(), sum})
	}
	return out, nil
}

// CheckLive compares the live bits of every disk with what the index shows of
// the first `chunks` chunks of every volume: each block that can be read must be live. It
// returns how many blocks can be read, and how many are live: more, by what is
// overwritten or hidden and not merged or reaped yet. It reads the index and
// blocks, as Digests does.
func (n *Node) CheckLive(chunks block.Chunk) (readable, live int64, err error) {
	for _, d := range n.disks {
		if d.failed == nil {
			live += d.index.LiveTotal()
		}
	}
	seen := make(map[*disk]map[seglog.Location]bool)
	for _, rep := range n.sorted() {
		if seen[rep.disk] == nil {
			seen[rep.disk] = make(map[seglog.Location]bool)
		}
		for _, v := range rep.state.Volumes() {
			for c := range chunks {
				if err := rep.checkChunk(v, c, seen[rep.disk]); err != nil {
					return 0, 0, fmt.Errorf("group %d replica %d, volume %v, chunk %d: %w", rep.key.Group, rep.key.Replica, v, c, err)
				}
			}
		}
	}
	for _, blocks := range seen {
		readable += int64(len(blocks))
	}
	return readable, live, nil
}

func (rep *replica) checkChunk(v block.VolumeID, c block.Chunk, seen map[seglog.Location]bool) error {
	l := rep.state.Lookup(index.Query{Volume: v, Generation: block.GenerationLatest, Chunk: c, Count: block.BlocksPerChunk})
	defer l.Release()
	if l.Pending() {
		if err := l.Load(); err != nil {
			return err
		}
	}
	for _, r := range l.Runs() {
		if r.State != block.Data || r.Place.Kind != index.KindLocal {
			continue
		}
		for i := range r.Count {
			at := seglog.Location{Segment: r.Place.At.Segment, Block: r.Place.At.Block + i}
			switch {
			case !rep.disk.index.Live(at.Segment, at.Block):
				return block.Errorf(block.Internal, "block %d is at %d.%d, which is not live", int(r.Block)+int(i), at.Segment, at.Block)
			case seen[at]:
				return block.Errorf(block.Internal, "block %d is at %d.%d, and so is another", int(r.Block)+int(i), at.Segment, at.Block)
			}
			seen[at] = true
		}
	}
	return nil
}

// CheckBlocks reads every block that the index shows of the first `chunks` chunks
// of every volume and checks it against its CRC. It returns how many were read.
// It reads the disks and blocks, as Digests does.
func (n *Node) CheckBlocks(chunks block.Chunk) (blocks int64, err error) {
	buf := make([]byte, block.ChunkBytes)
	for _, rep := range n.sorted() {
		for _, v := range rep.state.Volumes() {
			for c := range chunks {
				read, err := rep.checkBlocks(v, c, buf)
				if err != nil {
					return 0, fmt.Errorf("group %d replica %d, volume %v, chunk %d: %w", rep.key.Group, rep.key.Replica, v, c, err)
				}
				blocks += read
			}
		}
	}
	return blocks, nil
}

func (rep *replica) checkBlocks(v block.VolumeID, c block.Chunk, buf []byte) (blocks int64, err error) {
	l := rep.state.Lookup(index.Query{Volume: v, Generation: block.GenerationLatest, Chunk: c, Count: block.BlocksPerChunk})
	defer l.Release()
	if l.Pending() {
		if err := l.Load(); err != nil {
			return 0, err
		}
	}
	for _, r := range l.Runs() {
		if r.State == block.Data {
			blocks += int64(r.Count)
		}
	}
	return blocks, readRuns(rep.disk.log, l.Runs(), buf[:blocks*block.Size])
}
