package nbd

import (
	"crypto/tls"
	"log/slog"
	"time"

	"firn.io/firn/nbd/wire"
)

// Options of a [Server]. Zero values are the defaults.
//
// The memory that clients can make a server hold is at most MaxConnections x
// (about 2 MiB, of which 1 MiB is payload) + TotalBytes + 64 MiB.
type Options struct {
	// TLS, if set, lets clients start TLS (NBD_OPT_STARTTLS); RequireTLS lets
	// them do nothing else before. tls.RequireAndVerifyClientCert asks for
	// certificates of theirs; [ClientOf] tells Exports whose it is.
	TLS        *tls.Config
	RequireTLS bool
	// MaxConnections is how many connections may be open; a further one is
	// closed at once. 128.
	MaxConnections int
	// HandshakeTimeout is the time from accept to the transmission phase, not
	// counting Exports.Open. 10 s.
	HandshakeTimeout time.Duration
	// OpenTimeout bounds Exports.Open. 60 s.
	OpenTimeout time.Duration
	// StallTimeout is how long a client may leave replies unread or a payload
	// unfinished. 60 s.
	StallTimeout time.Duration
	// ConnectionBytes bounds the payload in flight on one connection; beyond it
	// the server stops reading. At least, and by default, 64 MiB.
	ConnectionBytes int64
	// TotalBytes bounds the payload in flight on all connections, beside the
	// 1 MiB that each may always have. While clients that read no replies hold
	// all of it, until StallTimeout, others go on within their 1 MiB. At least
	// 64 MiB; 128 MiB.
	TotalBytes int64
	// Workers bounds the calls to a Backend in flight for one connection. 128.
	// Twice as many requests may be in flight, their replies waiting to be
	// written among them; then the server stops reading.
	Workers int
	// Now tells the time for deadlines on sockets. time.Now.
	Now func() time.Time
	// Log receives clients coming and going. Discards.
	Log *slog.Logger
}

// Limits that no option changes.
const (
	// maxOptions bounds the options of one handshake.
	maxOptions = 32
	// maxOptionBytes bounds the data of one option.
	maxOptionBytes = 64 << 10
	// maxSkipOption and maxSkipPayload bound what is read only to be thrown
	// away; beyond them the connection ends.
	maxSkipOption  = 1 << 20
	maxSkipPayload = 2 * wire.MaxPayload

	maxPiece     = 1 << 20
	reserveBytes = maxPiece + headroom
	minBudget    = 2 * wire.MaxPayload

	inputBytes = 128 << 10
	// handshakeBytes is the input buffer before the transmission phase.
	handshakeBytes = 4096
	// A batch holds batchBytes of replies, of which batchCopied in its own
	// memory: those shorter than copyBelow (measured: writing 4 KiB from where
	// it is lent costs 0.15 us less than copying it), and all headers.
	batchBytes    = 256 << 10
	batchCopied   = 64 << 10
	maxBatchLoans = 256
	copyBelow     = 2 << 10
	// gatherBytes of replies are written at once over TLS.
	gatherBytes = 64 << 10

	// A block status answers maxStates extents, for which it pays statusBytes.
	maxStates   = 2048
	statusBytes = 128 << 10
	// A request is put back with at most keptHead bytes of a reply's memory.
	keptHead = 1 << 10
	// maxErrorText bounds the text that an error chunk carries.
	maxErrorText = 256

	pageBytes    = 4 << 10
	maxKeptPages = 64 << 20

	// maxStatusPayload is the effect length and two contexts.
	maxStatusPayload = 16
	maxQueuedBytes   = 1 << 20
)

func (o Options) withDefaults() Options {
	if o.MaxConnections <= 0 {
		o.MaxConnections = 128
	}
	if o.HandshakeTimeout <= 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.OpenTimeout <= 0 {
		o.OpenTimeout = time.Minute
	}
	if o.StallTimeout <= 0 {
		o.StallTimeout = time.Minute
	}
	o.ConnectionBytes = max(o.ConnectionBytes, minBudget)
	if o.TotalBytes <= 0 {
		o.TotalBytes = 128 << 20
	}
	o.TotalBytes = max(o.TotalBytes, minBudget)
	if o.Workers <= 0 {
		o.Workers = 128
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}
