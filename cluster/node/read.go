package node

import (
	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// viaLeader answers o once this replica is known to lead and to have applied
// all that was acknowledged before (F4): by ReadIndex, not by the token.
func (o *op) viaLeader() {
	g := o.rep.group
	if !g.Leading() {
		o.refuse(wire.StatusNotLeader, "")
		return
	}
	g.ReadIndex(func(_ uint64, ok bool) {
		if !ok {
			o.refuse(wire.StatusNotLeader, "")
			return
		}
		o.rep.whenApplied(o.req.Token, o, o.serve)
	})
}

// serve answers o from the state as it is now.
func (o *op) serve() {
	rec, ok := o.rep.state.Record(o.req.Volume)
	switch {
	case o.req.Kind == wire.ReqRecord && ok:
		resp := wire.Response{Status: wire.StatusOK, Applied: o.rep.state.AppliedVersion(), Result: wire.ApplyResult{Record: rec}}
		o.answer(&resp, nil)
	case !ok || rec.Tombstone:
		resp := wire.Response{Status: wire.StatusNoVolume, Applied: o.rep.state.AppliedVersion()}
		o.answer(&resp, nil)
	case rec.Epoch < o.req.Epoch:
		// Only a token below the reader's own Fence comes here.
		o.refuse(wire.StatusNotReady, "the group has not applied that attachment")
	case rec.Epoch > o.req.Epoch || rec.Nonce != o.req.Nonce:
		o.refuse(wire.StatusFenced, "")
	case o.req.Kind == wire.ReqRead:
		o.readBlocks()
	default:
		o.mapBlocks()
	}
}

// fetch is one read of blocks, from its pinned view to its bytes. Its blocking
// part, run, shares nothing with the loop.
type fetch struct {
	log    *seglog.Log
	lookup *index.Lookup

	resp wire.Response
	data *payload.Buf // nil when there are no bytes
	err  error
}

func (o *op) readBlocks() {
	q := o.req
	f := &fetch{log: o.rep.disk.log}
	f.lookup = o.rep.state.Lookup(index.Query{Volume: q.Volume, Generation: q.Generation, Chunk: q.Chunk, Block: q.Block, Count: q.Count})
	f.resp = wire.Response{Status: wire.StatusOK, Applied: f.lookup.Applied()}
	unpin := f.log.Pin()
	finish := func() {
		unpin()
		f.lookup.Release()
		o.finishRead(f)
	}
	if !f.lookup.Pending() && !holdsData(f.lookup.Runs()) {
		f.run(q.Chunk)
		finish()
		return
	}
	o.rep.disk.load(func() { f.run(q.Chunk) }, finish)
}

// load reads the disk.
func (d *disk) load(read, done func()) { d.work(loop.DiskRead, read, done) }

// work does something on the disk. The disks close only when none is under way.
func (d *disk) work(class loop.Class, work, done func()) {
	n := d.node
	n.loading++
	d.loop.Do(class, work, func() {
		done()
		if n.loading--; n.loading == 0 && n.loaded != nil {
			n.loaded()
		}
	})
}

func (o *op) finishRead(f *fetch) {
	if f.err != nil && block.KindOf(f.err) == block.Unavailable { // the log is closed
		o.refuse(wire.StatusNotReady, f.err.Error())
		return
	}
	if f.err != nil {
		o.node.counters.CorruptReads++
		o.rep.disk.corrupt++
		o.node.logf("group %d replica %d: read of volume %v, chunk %d, blocks %d to %d: %v",
			o.rep.key.Group, o.rep.key.Replica, o.req.Volume, o.req.Chunk, o.req.Block, int(o.req.Block)+int(o.req.Count)-1, f.err)
		o.refuse(wire.StatusCorrupt, f.err.Error())
		return
	}
	var bufs []*payload.Buf
	if f.data != nil {
		o.node.counters.ReadBytes += uint64(f.data.Len())
		bufs = append(bufs, f.data)
	}
	o.answer(&f.resp, bufs)
}

func holdsData(runs []index.Run) bool {
	for _, r := range runs {
		if r.State == block.Data {
			return true
		}
	}
	return false
}

// run loads what the look-up still lacks, reads the blocks and checks them. On
// an error nothing is held.
func (f *fetch) run(c block.Chunk) {
	if f.lookup.Pending() {
		if f.err = f.lookup.Load(); f.err != nil {
			return
		}
	}
	runs := f.lookup.Runs()
	blocks := 0
	for _, r := range runs {
		if r.State == block.Data {
			blocks += int(r.Count)
			f.resp.CRCs = append(f.resp.CRCs, r.CRCs...)
		}
		f.resp.Runs = appendRun(f.resp.Runs, wire.Run{Chunk: c, Block: r.Block, Count: r.Count, State: r.State})
	}
	if blocks == 0 {
		return
	}
	f.data = payload.New(blocks * block.Size)
	if f.err = readRuns(f.log, runs, f.data.Bytes()); f.err != nil {
		f.data.Release()
		f.data = nil
	}
}

// appendRun appends r, joined with the last run if it goes on in the same state.
func appendRun(runs []wire.Run, r wire.Run) []wire.Run {
	if n := len(runs); n > 0 {
		last := &runs[n-1]
		if last.State == r.State && last.Chunk == r.Chunk && int(last.Block)+int(last.Count) == int(r.Block) {
			last.Count += r.Count
			return runs
		}
	}
	return append(runs, r)
}

// stretch is runs that lie one after the other on the disk: one read.
type stretch struct {
	runs []index.Run
	dst  []byte
}

// stretches cuts dst, which has room for all data of runs, into what is read at
// once.
func stretches(runs []index.Run, dst []byte) ([]stretch, error) {
	var out []stretch
	for i := 0; i < len(runs); {
		if runs[i].State != block.Data {
			i++
			continue
		}
		from, blocks, next := i, 0, seglog.Location{}
		for i < len(runs) && runs[i].State == block.Data && (i == from || runs[i].Place.At == next) {
			if p := runs[i].Place; p.Kind != index.KindLocal || p.Framed {
				return nil, block.Errorf(block.Unsupported, "blocks are stored in a way that this build does not read (kind %d)", p.Kind)
			}
			blocks += int(runs[i].Count)
			next = seglog.Location{Segment: runs[i].Place.At.Segment, Block: runs[i].Place.At.Block + runs[i].Count}
			i++
		}
		out = append(out, stretch{runs[from:i], dst[:blocks*block.Size]})
		dst = dst[blocks*block.Size:]
	}
	return out, nil
}

// readRuns reads the data runs into dst, one behind the other, and checks each
// block against its CRC. Blocks that were written at random lie apart, and one
// after the other they would cost the disk's latency each. It blocks.
func readRuns(log *seglog.Log, runs []index.Run, dst []byte) error {
	parts, err := stretches(runs, dst)
	if err != nil {
		return err
	}
	return log.ReadEach(len(parts), func(i int) error { return parts[i].read(log) })
}

func (s stretch) read(log *seglog.Log) error {
	if err := log.ReadBlocks(s.runs[0].Place.At, s.dst); err != nil {
		return err
	}
	part := s.dst
	for _, r := range s.runs {
		n := len(r.CRCs) * block.Size
		if b := block.FirstBadCRC(r.CRCs, part[:n]); b >= 0 {
			return block.Errorf(block.Corrupt, "block %d, at %d.%d of the log, fails its checksum", int(r.Block)+b, r.Place.At.Segment, int(r.Place.At.Block)+b)
		}
		part = part[n:]
	}
	return nil
}

func (o *op) mapBlocks() {
	q := o.req
	m := o.rep.state.Map(index.MapQuery{Volume: q.Volume, Generation: q.Generation, From: q.Chunk, To: q.ToChunk, Max: wire.MaxRuns / 2})
	finish := func(err error) {
		resp := wire.Response{Status: wire.StatusOK, Applied: m.Applied()}
		if err == nil {
			resp.Runs, resp.Covered = m.Runs(), m.Covered()
		} else {
			resp.Status, resp.Text = wire.StatusCorrupt, err.Error()
		}
		o.answer(&resp, nil)
		m.Release()
	}
	if !m.Pending() {
		finish(nil)
		return
	}
	var err error
	o.rep.disk.load(func() { err = m.Load() }, func() { finish(err) })
}
