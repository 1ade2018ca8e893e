package nbd

import (
	"context"
	"errors"
	"io/fs"
	"syscall"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd/wire"
)

// translate is how Firn's error kinds are told to an NBD client: as the error
// number of a request, and as the refusal of INFO and GO. Fenced and Canceled
// say ESHUTDOWN: this connection is over, another may work. (Clients with a
// Session are told by its end: session.leaveOn.)
func translate(k block.Kind) (wire.Errno, wire.OptReply) {
	switch k {
	case block.NotFound:
		return wire.EIO, wire.RepErrUnknown
	case block.Exists, block.Busy:
		return wire.EIO, wire.RepErrPolicy
	case block.Invalid, block.OutOfRange:
		return wire.EINVAL, wire.RepErrInvalid
	case block.ReadOnly, block.Denied:
		return wire.EPERM, wire.RepErrPolicy
	case block.NoSpace:
		return wire.ENOSPC, wire.RepErrPlatform
	case block.Fenced:
		return wire.ESHUTDOWN, wire.RepErrPolicy
	case block.Canceled:
		return wire.ESHUTDOWN, wire.RepErrShutdown
	case block.Unsupported:
		return wire.ENOTSUP, wire.RepErrUnsup
	}
	// Internal, Unavailable, Corrupt, and kinds that this table does not know.
	return wire.EIO, wire.RepErrPlatform
}

// errnoOf translates a Backend's error for a request of command c. The spec
// wants ENOSPC for writes past the end and EINVAL for other requests past it,
// and allows ENOTSUP only for fast zeroes.
func errnoOf(err error, c wire.Command, f wire.CommandFlags) wire.Errno {
	e := rawErrno(err)
	switch writes := c == wire.CmdWrite || c == wire.CmdWriteZeroes; {
	case writes && errors.Is(err, block.OutOfRange):
		return wire.ENOSPC
	case e == wire.ENOTSUP && f&wire.FlagFastZero == 0:
		return wire.EINVAL
	case e == wire.EOVERFLOW:
		return wire.EINVAL
	}
	return e
}

func rawErrno(err error) wire.Errno {
	var e wire.Errno
	if errors.As(err, &e) {
		for _, known := range wire.Errnos {
			if e == known {
				return e
			}
		}
		return wire.EIO
	}
	if k := block.KindOf(err); k != block.Internal {
		e, _ = translate(k)
		return e
	}
	if errors.Is(err, context.Canceled) {
		return wire.ESHUTDOWN
	}
	var sys syscall.Errno
	errors.As(err, &sys)
	switch sys {
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return wire.EPERM
	case syscall.ENOMEM:
		return wire.ENOMEM
	case syscall.EINVAL:
		return wire.EINVAL
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return wire.ENOSPC
	case syscall.EOPNOTSUPP:
		return wire.ENOTSUP
	case syscall.ESHUTDOWN:
		return wire.ESHUTDOWN
	}
	return wire.EIO
}

// refusalOf translates an error of Exports.
func refusalOf(err error) wire.OptReply {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return wire.RepErrUnknown
	case errors.Is(err, ErrTLSRequired):
		return wire.RepErrTLSRequired
	case errors.Is(err, fs.ErrPermission):
		return wire.RepErrPolicy
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return wire.RepErrShutdown
	}
	_, refusal := translate(block.KindOf(err))
	return refusal
}
