package cluster

import (
	"context"
	"slices"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// query is a read or a map on its way to an answer that may be shown (R1, F4).
//
// It asks the leader first, as far as known, since that has applied what it
// acknowledged; a replica that is slow, behind, unreachable or holds rotten
// bytes is passed by for another. When all have been asked it pauses for a tick
// and begins again, more patiently. Only a good answer, the end of ctx or of the
// attachment ends it, and corrupt bytes on every replica.
type query struct {
	call
	client *Client
	stream *stream
	group  *group
	req    wire.Request

	asked    []block.NodeID // in this round
	corrupt  []block.NodeID // whose bytes were bad
	sentOnce bool
	delayed  bool   // in client.delayed
	round    uint64 // of client, when it was delayed

	prev, next *query // in Attachment.queries

	// One of them is set: pieces for a read; answered, for others, gets a response
	// that is the client's again when it returns.
	pieces   func([]payload.Piece, error)
	answered func(*wire.Response, error)
}

func (c *Client) newQuery(ctx context.Context, s *stream) *query {
	var q *query
	if n := len(c.freeQueries); n > 0 {
		q = c.freeQueries[n-1]
		c.freeQueries = c.freeQueries[:n-1]
	} else {
		q = &query{client: c}
		q.call.ended = q.attemptEnded
	}
	q.ctx, q.stream, q.group, q.slow = ctx, s, s.group, slowRead
	q.req.Group, q.req.Volume, q.req.Generation = s.group.id, s.att.vol.ID, block.GenerationLatest
	s.att.linkQuery(q)
	return q
}

// send makes an attempt, at once or, if there is nobody to ask, at a later tick.
func (q *query) send() {
	q.delayed = false
	if q.ctx.Err() != nil {
		q.finish(nil, nil, block.Wrap(block.Canceled, context.Cause(q.ctx), "the caller gave up"))
		return
	}
	a := q.stream.att
	q.req.Layout, q.req.Epoch, q.req.Nonce, q.req.Token = a.vol.Layout, a.owner.Epoch, a.owner.Nonce, q.stream.token
	q.req.LeaderOnly = !a.current()
	for {
		node := q.target()
		if node == 0 {
			q.later()
			return
		}
		q.asked = append(q.asked, node)
		cn := q.client.connTo(node)
		if cn == nil {
			continue
		}
		q.client.counters.Queries++
		if q.sentOnce {
			q.client.counters.QueryRetries++
		}
		q.sentOnce = true
		if q.client.start(&q.call, cn, &q.req, nil) {
			return
		}
	}
}

// target is the node to ask next in this round; 0 when all were asked.
func (q *query) target() block.NodeID {
	if l := q.group.leader; l != 0 && !slices.Contains(q.asked, l) && !q.client.suspected(l) {
		return l
	}
	return q.group.pick(q.asked)
}

// later begins another round at the next tick.
func (q *query) later() {
	q.asked = q.asked[:0]
	q.slow = min(2*q.slow, slowestRead)
	q.delayed, q.round = true, q.client.round
	q.client.delayed = append(q.client.delayed, q)
	q.client.armTick()
}

func (q *query) attemptEnded(resp *wire.Response, bufs []*payload.Buf) {
	g := q.group
	if resp == nil {
		q.send()
		return
	}
	if g.leader == 0 {
		g.leads(resp.Leader)
	}
	q.client.counters.answered(resp.Status)
	switch resp.Status {
	case wire.StatusOK:
		q.stream.raise(resp.Applied)
		if !q.req.LeaderOnly && !q.stream.att.current() {
			break // the lease ran out meanwhile: another may own the volume (F4)
		}
		if q.req.Kind == wire.ReqRead && !q.verify(resp, bufs) {
			q.client.counters.BadReads++
			break
		}
		q.finish(resp, bufs, nil)
		return
	case wire.StatusNotLeader:
		if g.leader == q.node {
			g.leader = 0
		}
		if !slices.Contains(q.asked, resp.Leader) {
			g.leads(resp.Leader)
		}
	case wire.StatusCorrupt:
		q.isCorrupt()
	case wire.StatusStaleLayout:
		q.stream.att.refresh()
		q.later()
	case wire.StatusFenced, wire.StatusNoVolume:
		// Perhaps the end of the attachment; it finds out.
		q.later()
		if a := q.stream.att; q.req.Epoch == a.owner.Epoch && !a.paused {
			a.refuted()
		}
	case wire.StatusInvalid:
		release(bufs)
		q.finish(nil, nil, block.Errorf(block.Internal, "node %d refuses a read: %s", q.node, resp.Text))
		return
	}
	release(bufs)
	if !q.delayed && !q.hopeless() {
		q.send()
	}
}

// isCorrupt notes that the node that answered has no good copy.
func (q *query) isCorrupt() {
	if !slices.Contains(q.corrupt, q.node) {
		q.corrupt = append(q.corrupt, q.node)
	}
}

// hopeless ends the query when no replica has a good copy.
func (q *query) hopeless() bool {
	for _, n := range q.group.replicas {
		if !slices.Contains(q.corrupt, n) {
			return false
		}
	}
	if len(q.group.replicas) == 0 {
		return false
	}
	q.finish(nil, nil, block.Errorf(block.Corrupt, "no good copy of the blocks %d to %d of chunk %d in group %d",
		q.req.Block, int(q.req.Block)+int(q.req.Count)-1, q.req.Chunk, q.group.id))
	return true
}

// verify tells whether the answer covers what was asked for and its bytes match
// their checksums (R2).
func (q *query) verify(resp *wire.Response, bufs []*payload.Buf) bool {
	at, blocks := q.req.Block, 0
	for _, r := range resp.Runs {
		if r.Chunk != q.req.Chunk || r.Block != at {
			q.isCorrupt()
			return false
		}
		at += block.Index(r.Count)
		if r.State == block.Data {
			blocks += int(r.Count)
		}
	}
	crcs := resp.CRCs
	ok := int(at) == int(q.req.Block)+int(q.req.Count) && blocks == len(crcs)
	for _, b := range bufs {
		for p := b.Bytes(); len(p) > 0 && ok; p = p[block.Size:] {
			ok = len(p) >= block.Size && len(crcs) > 0 && block.CRC(p[:block.Size]) == crcs[0]
			if !ok {
				break
			}
			crcs = crcs[1:]
		}
	}
	if !ok || len(crcs) != 0 {
		q.isCorrupt()
		return false
	}
	return true
}

// finish ends q and tells. It takes over the holds of bufs.
func (q *query) finish(resp *wire.Response, bufs []*payload.Buf, err error) {
	q.stream.att.unlinkQuery(q)
	c, ended, pieces, answered := q.client, q.call.ended, q.pieces, q.answered
	*q = query{client: c, call: call{ended: ended}, asked: q.asked[:0], corrupt: q.corrupt[:0]}
	if len(c.freeQueries) < maxFreeOps {
		c.freeQueries = append(c.freeQueries, q)
	}
	switch {
	case answered != nil:
		release(bufs)
		answered(resp, err)
	case err != nil:
		pieces(nil, err)
	default:
		got := piecesOf(c.pieces[:0], resp.Runs, bufs)
		c.pieces = nil // whoever is told may read again
		pieces(got, nil)
		clear(got)
		c.pieces = got
	}
}

// withdraw takes q out of everything that would send it or tell it of an answer.
func (q *query) withdraw() {
	c := q.client
	c.forget(&q.call)
	if i := slices.Index(c.delayed, q); i >= 0 {
		c.delayed = slices.Delete(c.delayed, i, i+1)
	}
	q.delayed = false
}
