package nbd

import (
	"context"
	"errors"
	"fmt"

	"firn.io/firn/nbd/wire"
)

// handshake is the state of option haggling. It talks to nobody but Exports:
// option takes one option and appends the answer to out.
type handshake struct {
	exports callTracker
	open    func(name string) (*Export, error)
	flags   wire.ClientFlags
	options int

	headers wire.Headers
	// mapped says that base:allocation was selected, for the export mappedFor
	// only.
	mapped    bool
	mappedFor string
	tls       tlsMode
	// session is what the client said of itself, zero if it did not.
	session Session

	out []byte
	// entered is the export that the client may now use, as asked for by name.
	entered *Export
	name    string
}

var (
	// errAborted: the client said NBD_OPT_ABORT, and has been answered.
	errAborted = errors.New("client aborted the handshake")
	errTooMany = fmt.Errorf("%w: more than %d options", wire.ErrMalformed, maxOptions)
)

// admit checks an option's head before its data are read. It tells whether to
// read the n bytes of data, or to skip them: then it has answered.
func (h *handshake) admit(o wire.Option, n uint32) (read bool, err error) {
	if h.options++; h.options > maxOptions {
		return false, errTooMany
	}
	switch {
	case h.flags&wire.ClientFixedNewstyle == 0 && o != wire.OptExportName:
		return false, fmt.Errorf("%w: option %d from a client without fixed newstyle", wire.ErrMalformed, o)
	case o == wire.OptExportName && n > wire.MaxName:
		return false, fmt.Errorf("%w: export name of %d bytes", wire.ErrMalformed, n)
	case n > maxSkipOption:
		return false, fmt.Errorf("%w: option %d with %d bytes of data", wire.ErrMalformed, o, n)
	case n > maxOptionBytes:
		h.refuse(o, wire.RepErrTooBig, fmt.Sprintf("an option has at most %d bytes", maxOptionBytes))
		return false, nil
	}
	return true, nil
}

// option answers an option. An error ends the connection after out was written.
func (h *handshake) option(ctx context.Context, o wire.Option, data []byte) error {
	if barred, err := h.barred(o); barred {
		return err
	}
	switch o {
	case wire.OptStartTLS:
		return h.startTLS(data)
	case wire.OptExportName:
		return h.exportName(data)
	case wire.OptAbort:
		h.ack(o)
		return errAborted
	case wire.OptList:
		h.list(ctx, data)
	case wire.OptInfo, wire.OptGo:
		h.infoOrGo(ctx, o, data)
	case wire.OptStructuredReply:
		if len(data) != 0 {
			h.refuse(o, wire.RepErrInvalid, "the option takes no data")
			return nil
		}
		if h.headers == wire.ExtendedHeaders {
			h.refuse(o, wire.RepErrExtHeaderReqd, "extended headers include structured replies")
			return nil
		}
		h.headers = wire.StructuredReplies
		h.ack(o)
	case wire.OptExtendedHeaders:
		if len(data) != 0 || h.headers == wire.ExtendedHeaders {
			h.refuse(o, wire.RepErrInvalid, "the option takes no data, and is said once")
			return nil
		}
		h.headers = wire.ExtendedHeaders
		h.ack(o)
	case wire.OptListMetaContext, wire.OptSetMetaContext:
		h.metaContext(ctx, o, data)
	case wire.OptSession:
		session, err := wire.ParseSession(data)
		if err != nil {
			h.refuse(o, wire.RepErrInvalid, err.Error())
			return nil
		}
		h.session = session
		h.ack(o)
	default:
		h.refuse(o, wire.RepErrUnsup, "the option is not supported")
	}
	return nil
}

func (h *handshake) reply(o wire.Option, r wire.OptReply, data []byte) {
	h.out = wire.AppendOptReply(h.out, o, r, data)
}

func (h *handshake) ack(o wire.Option) { h.reply(o, wire.RepAck, nil) }

func (h *handshake) refuse(o wire.Option, r wire.OptReply, text string) {
	h.reply(o, r, []byte(wire.Cut(text)))
}

// exportName has no way to refuse but to hang up.
func (h *handshake) exportName(data []byte) error {
	name, err := wire.ParseName(data)
	if err != nil {
		return err
	}
	e, err := h.open(name)
	if err != nil {
		return err
	}
	h.entered, h.name = e, name
	h.out = wire.AppendExportName(h.out, uint64(e.Info.Bytes), exportFlags(e.Info, h.headers),
		h.flags&wire.ClientNoZeroes == 0)
	return nil
}

func (h *handshake) list(ctx context.Context, data []byte) {
	if len(data) != 0 {
		h.refuse(wire.OptList, wire.RepErrInvalid, "the option takes no data")
		return
	}
	infos, err := h.exports.List(ctx)
	if err != nil {
		h.refuse(wire.OptList, refusalOf(err), err.Error())
		return
	}
	for _, i := range infos {
		h.reply(wire.OptList, wire.RepServer, wire.AppendServer(nil, wire.Cut(i.Name), i.Description))
	}
	h.ack(wire.OptList)
}

func (h *handshake) infoOrGo(ctx context.Context, o wire.Option, data []byte) {
	r, err := wire.ParseInfoRequest(data)
	if err != nil {
		h.refuse(o, wire.RepErrInvalid, err.Error())
		return
	}
	var info Info
	if o == wire.OptGo {
		var e *Export
		if e, err = h.open(r.Name); err == nil {
			info, h.entered, h.name = e.Info, e, r.Name
		}
	} else {
		info, err = h.exports.Info(ctx, r.Name)
	}
	if err != nil {
		h.refuse(o, refusalOf(err), err.Error())
		return
	}
	h.reply(o, wire.RepInfo, wire.AppendInfoExport(nil, uint64(info.Bytes), exportFlags(info, h.headers)))
	h.reply(o, wire.RepInfo, wire.AppendInfoBlockSize(nil, blockSizes(info)))
	if r.Wants(wire.InfoName) {
		h.reply(o, wire.RepInfo, wire.AppendInfoText(nil, wire.InfoName, info.Name))
	}
	if r.Wants(wire.InfoDescription) && info.Description != "" {
		h.reply(o, wire.RepInfo, wire.AppendInfoText(nil, wire.InfoDescription, info.Description))
	}
	h.ack(o)
}

// metaContext: what SET selects holds for the export that it names, and every
// SET, also one that fails, forgets the one before.
func (h *handshake) metaContext(ctx context.Context, o wire.Option, data []byte) {
	set := o == wire.OptSetMetaContext
	if set {
		h.mapped, h.mappedFor = false, ""
	}
	r, err := wire.ParseMetaRequest(data)
	if err == nil && h.headers == wire.SimpleReplies {
		err = fmt.Errorf("%w: metadata contexts need structured replies", wire.ErrMalformed)
	}
	if err != nil {
		h.refuse(o, wire.RepErrInvalid, err.Error())
		return
	}
	info, err := h.exports.Info(ctx, r.Export)
	if err != nil {
		h.refuse(o, refusalOf(err), err.Error())
		return
	}
	match := !set && len(r.Queries) == 0
	for _, q := range r.Queries {
		match = match || wire.MatchesBaseAllocation(q, !set)
	}
	if match && info.Offers&OfferMap != 0 {
		id := uint32(0)
		if set {
			id, h.mapped, h.mappedFor = contextID, true, r.Export
		}
		h.reply(o, wire.RepMetaContext, wire.AppendMetaContext(nil, id, wire.BaseAllocation))
	}
	h.ack(o)
}
