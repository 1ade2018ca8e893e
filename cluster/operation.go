package cluster

import (
	"context"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// operation is a command on its way to a definite answer of apply. Its command
// does not change between attempts (W3), and nothing but apply ends it (W4),
// with three exceptions: the end of the attachment, after which this process
// never installs another epoch for what is pending; a refusal before the command
// was proposed, if no earlier attempt can have been; and, for commands without an
// opSeq, which are idempotent, the end of ctx.
type operation struct {
	call
	client *Client
	group  *group
	stream *stream      // nil for commands without an opSeq; only those have a call.ctx
	req    wire.Request // with the command
	buf    *payload.Buf

	sentOnce  bool
	attempted bool // an attempt was made whose effect is unknown
	waits     bool // in group.retry
	probe     bool // group.probing is about it
	reported  bool // that it is in trouble was logged

	prev, next *operation // in stream.pending

	// One of them is set. The result is the client's again when answered returns.
	done     func(error)
	answered func(*wire.ApplyResult, error)
}

func (c *Client) newOperation() *operation {
	if n := len(c.freeOps); n > 0 {
		op := c.freeOps[n-1]
		c.freeOps = c.freeOps[:n-1]
		return op
	}
	op := &operation{client: c}
	op.call.ended = op.attemptEnded
	op.call.slow = slowCommand
	return op
}

// maxFreeOps bounds the operations, and the queries, that are kept for use again.
const maxFreeOps = 1024

// free makes op ready to be used again. Nothing refers to it any more.
func (op *operation) free() {
	c, ended := op.client, op.call.ended
	if op.buf != nil {
		op.buf.Release()
	}
	*op = operation{client: c, call: call{ended: ended, slow: slowCommand}}
	if len(c.freeOps) < maxFreeOps {
		c.freeOps = append(c.freeOps, op)
	}
}

// send makes an attempt at a node. False: nothing was sent.
func (op *operation) send(node block.NodeID) bool {
	c := op.client
	cn := c.connTo(node)
	if cn == nil {
		return false
	}
	if op.stream != nil {
		op.req.Layout = op.stream.att.vol.Layout
	}
	c.counters.Commands++
	if op.sentOnce {
		c.counters.CommandRetries++
	}
	op.sentOnce = true
	return c.start(&op.call, cn, &op.req, op.buf)
}

// attemptEnded takes the end of one attempt: an answer, or that there is none.
func (op *operation) attemptEnded(resp *wire.Response, bufs []*payload.Buf) {
	release(bufs)
	g := op.group
	if op.probe {
		op.probe, g.probing = false, false
	}
	if resp == nil {
		if op.givenUp() {
			g.flush()
			return
		}
		op.attempted = true
		op.slow = min(2*op.slow, slowestCommand)
		g.refuse(op.node)
		op.again()
		return
	}
	if resp.Status == wire.StatusOK {
		g.leader = op.node
		op.applied(resp)
		g.flush()
		return
	}
	if err := op.refused(resp); err != nil {
		op.finish(nil, err)
		g.flush()
		return
	}
	op.again()
}

// refused takes a refusal; an error ends op.
func (op *operation) refused(resp *wire.Response) error {
	g := op.group
	op.client.counters.answered(resp.Status)
	switch resp.Status {
	case wire.StatusNotLeader:
		g.refuse(op.node)
		g.leads(resp.Leader)
	case wire.StatusUnknownGroup, wire.StatusNotReady:
		g.refuse(op.node)
	case wire.StatusDropped:
		op.attempted = true
	case wire.StatusBusy:
	case wire.StatusStaleLayout:
		if op.stream != nil {
			op.stream.att.refresh()
		} else {
			// A Fence or a deletion, by a metadata store that is behind.
			op.req.Layout = max(op.req.Layout, resp.NewLayout)
		}
	case wire.StatusNoSpace:
		if !op.attempted {
			return block.Errorf(block.NoSpace, "the disks of group %d are full: trim or delete data, or add disks", g.id)
		}
	case wire.StatusInvalid:
		if !op.attempted {
			return block.Errorf(block.Internal, "node %d refuses a command as invalid: %s", op.node, resp.Text)
		}
		op.report("refused as invalid", resp.Text)
	default:
		op.report("refused", resp.Text)
	}
	return nil
}

// again sends op once more, now or later, unless nobody wants it any more.
func (op *operation) again() {
	if op.givenUp() {
		return
	}
	// What a leader could not take now is not thrown at it in the same turn.
	op.group.later(op)
	if op.group.leader != op.node {
		op.group.flush()
	}
}

// givenUp ends op if nobody waits for it any more.
func (op *operation) givenUp() bool {
	if op.ctx == nil || op.ctx.Err() == nil {
		return false
	}
	op.finish(nil, block.Wrap(block.Canceled, context.Cause(op.ctx), "group %d has not answered", op.group.id))
	return true
}

// report logs an operation in trouble, once.
func (op *operation) report(what, why string) {
	if op.reported {
		return
	}
	op.reported = true
	op.client.log.Warn("command is not taken, retrying", "what", what, "group", op.group.id, "node", op.node,
		"volume", op.req.Command.Volume, "opseq", op.req.Command.OpSeq, "why", why)
}

// applied takes what apply made of op.
func (op *operation) applied(resp *wire.Response) {
	if op.stream == nil {
		op.finish(&resp.Result, nil)
		return
	}
	op.stream.raise(max(resp.Applied, resp.Result.Version))
	switch o := resp.Result.Outcome; o {
	case wire.OutcomeApplied:
		op.finish(&resp.Result, nil)
	case wire.OutcomeOutOfRange:
		op.finish(nil, block.Errorf(block.OutOfRange, "the volume has shrunk"))
	case wire.OutcomeReadOnly:
		op.finish(nil, block.Errorf(block.ReadOnly, "volume %q is read-only", op.stream.att.vol.Name))
	case wire.OutcomeOldEpoch, wire.OutcomeNoVolume:
		op.client.counters.Fenced++
		// Not the end of it: the attachment finds out whether it is over.
		op.stream.att.refuted()
	case wire.OutcomeBelowFloor, wire.OutcomeBeyondWindow:
		op.attempted = true
		op.report("outcome", "opSeq outside the group's window")
		op.again()
	default:
		op.finish(nil, block.Errorf(block.Internal, "group %d refuses a command with outcome %d", op.group.id, o))
	}
}

// finish ends op and tells.
func (op *operation) finish(res *wire.ApplyResult, err error) {
	s := op.stream
	if s != nil {
		s.settle(op)
	}
	done, answered := op.done, op.answered
	if answered != nil {
		answered(res, err)
	}
	op.free()
	if done != nil {
		done(err)
	}
	if s != nil && s.att.draining != nil {
		s.att.draining()
	}
}

// withdraw takes op out of everything that would send it or tell it of an
// answer. Its effect is unknown from then on.
func (op *operation) withdraw() {
	g := op.group
	if op.probe {
		op.probe, g.probing = false, false
	}
	if op.waits {
		g.drop(op)
	}
	op.client.forget(&op.call)
}
